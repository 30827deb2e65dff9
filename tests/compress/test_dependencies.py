"""Slices that belong together, for each way of connecting layers."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.compress.dependencies import Unit, removable_units
from trainer.compress.layers import rebuild_attention
from trainer.testing import ExampleNet


class Net(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.function(self, x)
        return output


def layers(units: list[Unit]) -> dict[str, int]:
    """The number of units by the dimensions that they are removed from."""
    return dict(Counter(" ".join(sorted(f"{n}:{d}" for n, d in u.dimensions)) for u in units))


def conv(inputs: int, outputs: int, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **settings)


IMAGES = torch.randn(2, 3, 8, 8)


def test_batch_norm_and_flattened_channels_belong_to_their_convolution() -> None:
    units = removable_units(ExampleNet(), torch.randn(2, 2, 6, 6))
    norm = " ".join(f"norm.{n}:0" for n in ("bias", "running_mean", "running_var", "weight"))
    assert layers(units) == {
        f"conv.weight:0 fc1.weight:1 {norm}": 6,
        "fc1.bias:0 fc1.weight:0 fc2.weight:1": 12,
    }
    columns = next(part for part in units[1].parts if part.name == "fc1.weight")
    assert columns.positions == tuple(range(9, 18))  # 3 x 3 pixels of the second channel


def head(net: Any, x: Tensor) -> Any:
    return net.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (  # a sum ties all channels, whatever is between
            lambda n, x: head(n, n.a(x).relu() + F.max_pool2d(n.b(x), 3, 1, 1) * 0.5),
            {"a.weight:0 b.weight:0 fc.weight:1": 8},
        ),
        (  # in a concatenation each has columns of its own
            lambda n, x: n.wide(torch.cat([n.a(x), n.b(x)], 1).mean((2, 3))),
            {"a.weight:0 wide.weight:1": 8, "b.weight:0 wide.weight:1": 8},
        ),
        (  # some channels end in the output
            lambda n, x: torch.cat([head(n, n.a(x)), n.a(x)[:, :2].mean((2, 3))], 1),
            {"a.weight:0 fc.weight:1": 6},
        ),
        (  # padding of channels; the padded ones stay
            lambda n, x: n.wide(F.pad(n.a(x), (0, 0, 0, 0, 4, 4)).mean((2, 3))),
            {"a.weight:0 wide.weight:1": 8},
        ),
        (
            lambda n, x: head(n, n.depthwise(n.a(x))),
            {"a.weight:0 depthwise.weight:0 fc.weight:1": 8},
        ),
        (  # the same channel of each group
            lambda n, x: head(n, n.grouped(n.a(x))),
            {"a.weight:0 grouped.weight:1": 4, "fc.weight:1 grouped.weight:0": 4},
        ),
        (
            lambda n, x: head(n, n.up(n.a(x))),
            {"a.weight:0 up.weight:0": 8, "fc.weight:1 up.weight:1": 8},
        ),
        (lambda n, x: head(n, n.norm(n.a(x))), {}),  # channels that are normalized together
        (lambda n, x: head(n, n.a(x).softmax(1)), {}),
        (lambda n, x: head(n, n.a(x) + torch.ones(8, 1, 1)), {}),  # a constant of the code
        (lambda n, x: head(n, n.a(x).sort(1).values), {}),  # an operator that is not known
        (lambda n, x: n.a(x).sum((2, 3)), {}),
        (lambda n, x: head(n, n.a(x) * n.a(x).mean(1, keepdim=True)), {}),
        (lambda n, x: (head(n, n.a(x)), n.a(x).mean(1))[0], {"a.weight:0 fc.weight:1": 8}),
    ],
    ids=[
        *("sum", "cat", "output", "pad", "depthwise", "grouped", "transposed", "group norm"),
        *("softmax", "constant", "unknown", "outputs", "mean", "unused"),
    ],
)  # fmt: skip
def test_connections(function: Any, expected: dict[str, int]) -> None:
    net = Net(
        function,
        a=conv(3, 8),
        b=conv(3, 8),
        depthwise=conv(8, 8, groups=8),
        grouped=conv(8, 8, groups=2),
        up=nn.ConvTranspose2d(8, 8, 2, 2, bias=False),
        norm=nn.GroupNorm(2, 8),
        fc=nn.Linear(8, 3, bias=False),
        wide=nn.Linear(16, 3, bias=False),
    )
    assert layers(removable_units(net, IMAGES)) == expected


def test_a_head_is_removed_from_all_projections() -> None:
    net = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    rebuild_attention(net)
    units = removable_units(net, torch.randn(2, 5, 16))
    assert sorted(layers(units).values()) == [4, 32]
    rows = {p.name: p.positions for p in units[1].parts if p.name.endswith(".weight")}
    second = tuple(range(4, 8))
    assert rows["self_attn.out_proj.weight"] == second
    assert rows["self_attn.in_proj.weight"] == tuple(16 * k + i for k in range(3) for i in second)


def test_tied_weights_and_training_mode_are_respected() -> None:
    net = Net(
        lambda n, x: n.c(n.b(n.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 4)
    )
    net.c.weight = nn.Parameter(net.a.weight.detach().t().clone())
    net.b.weight = nn.Parameter(torch.randn(6, 6))
    assert sorted(layers(removable_units(net, torch.randn(2, 4))).values()) == [6, 6]
    assert net.training
