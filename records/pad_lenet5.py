"""Write the file of a narrow LeNet-5 as one of all of LeNet-5, with zeros where units were removed.

    python records/pad_lenet5.py runs/small/model.dcz model.dcz

A file of a narrow model says which units were removed, which takes more bytes than their zeros.
"""

import sys
from pathlib import Path

import torch

from trainer import artifact
from trainer.models import LeNet5


def padded(narrow: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state_dict of LeNet-5 that computes the same, the units that there are coming first."""
    full = {}
    for name, tensor in LeNet5().state_dict().items():
        small, wide = narrow[name], torch.zeros_like(tensor)
        if name == "fc1.weight":  # 16 positions of each filter of conv2
            small, wide = small.unflatten(1, (-1, 16)), wide.unflatten(1, (-1, 16))
        wide[tuple(slice(size) for size in small.shape)] = small
        full[name] = wide.reshape(tensor.shape)
    return full


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    about = {"model": {"_target_": "trainer.models.LeNet5", "classes": 10}}
    target.write_bytes(artifact.encode(padded(artifact.loads(source.read_bytes())), about=about))
