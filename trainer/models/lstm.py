"""A word- or character-level language model with LSTM layers."""

from torch import Tensor, nn


class LSTMLanguageModel(nn.Module):
    """Embedding, LSTM, Linear over the vocabulary (Zaremba et al. 2014).

    Tokens [N, T] int64 below `vocabulary` -> logits [N, T, vocabulary]; position t sees tokens up
    to t. The state starts at zero in every sequence. `dropout` is the probability of dropping a
    unit between layers, never along time. `tied` makes the embedding the output matrix too (Press
    & Wolf 2017). Raises ValueError if `tied` and `embedding` != `hidden`.
    """

    def __init__(
        self,
        vocabulary: int = 96,
        embedding: int = 64,
        hidden: int = 256,
        layers: int = 1,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if tied and embedding != hidden:
            raise ValueError(
                f"tied=true needs embedding and hidden to be equal: {embedding} and {hidden}"
            )
        self.encoder = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(
            embedding,
            hidden,
            layers,
            batch_first=True,
            # nn.LSTM would warn about dropout between layers if there is only one.
            dropout=dropout if layers > 1 else 0.0,
        )
        self.decoder = nn.Linear(hidden, vocabulary)
        self.dropout = nn.Dropout(dropout)

        # With the default N(0, 1), the logits of a tied output matrix would be too large.
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.dropout(self.encoder(tokens)))
        logits: Tensor = self.decoder(self.dropout(x))
        return logits
