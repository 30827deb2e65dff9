"""Text, character by character, for language models.

By default it is the reference text that Python's `help()` shows (`pydoc_data.topics`, about 465,000
characters in Python 3.11), which every machine has. It differs between versions of Python, so only
compare results of the same version.
"""

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from trainer.data.split import Splits, TensorSplit

VALIDATION_PERCENT = TEST_PERCENT = 5  # of the characters, at the end of the text


def python_topics() -> str:
    """The texts of `pydoc_data.topics`, joined in the order of their names."""
    # Imported here, because only this function needs it and it is a large module.
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def alphabet(text: str, size: int) -> str:
    """The `size` most frequent characters of `text` (ties: lower code point first), sorted."""
    counts = Counter(text)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    return "".join(sorted(ranked[:size]))


def encode(text: str, characters: str) -> Tensor:
    """int64 [len(text)]: 1 + the position of each character in `characters`, 0 for any other."""
    codes = torch.frombuffer(bytearray(text, "utf-32-le"), dtype=torch.int32).long()
    table = torch.zeros(0x110000, dtype=torch.int64)  # every code point of Unicode
    for position, character in enumerate(characters):
        table[ord(character)] = 1 + position
    return table[codes]


def windows(ids: Tensor, context: int, part: str) -> TensorSplit:
    """Consecutive windows of `context` ids, each with the same one character later as targets."""
    n = (len(ids) - 1) // context
    if n < 1:
        raise ValueError(
            f"the text's {part} part holds {len(ids)} characters, but data.context={context} needs "
            f"at least {context + 1}: use a longer text or a shorter context"
        )
    used = n * context
    return TensorSplit(ids[:used].view(n, context), ids[1 : used + 1].view(n, context))


def text(context: int = 64, vocabulary: int = 96, path: str | None = None) -> Splits:
    """Windows of characters: inputs int64 [n, context], targets the same one character later.

    The first 90% of the text are for training, the next 5% for validation, the last 5% for testing.

    Args:
        context: Characters per window.
        vocabulary: Number of different ids. The model's vocabulary must be the same. Id 0 stands
            for all rare characters, the others for the most frequent ones of the training part.
        path: A UTF-8 text file. None: the reference text of Python.

    Raises:
        ValueError: The file is missing, too short or not UTF-8, or a number is out of range.
    """
    if context < 1:
        raise ValueError(f"data.context={context}: it must be at least 1 character")
    if vocabulary < 2:
        raise ValueError(f"data.vocabulary={vocabulary}: it must be at least 2 (0 is for the rest)")
    if path is None:
        content = python_topics()
    else:
        try:
            content = Path(path).expanduser().read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ValueError(f"data.path={path}: there is no such file") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"data.path={path}: it must be UTF-8 text ({error})") from None

    fitted = len(content) * (100 - VALIDATION_PERCENT - TEST_PERCENT) // 100
    tested = len(content) * (100 - TEST_PERCENT) // 100
    ids = encode(content, alphabet(content[:fitted], vocabulary - 1))
    return Splits(
        train=windows(ids[:fitted], context, "training"),
        validation=windows(ids[fitted:tested], context, "validation"),
        test=windows(ids[tested:], context, "test"),
    )
