"""Matrices for the EIE simulator: from compressed models, or random with given densities."""

import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer import artifact
from trainer.compress.codebooks import codebook_of
from trainer.errors import ConfigError
from trainer.hardware.eie.encoding import Codes

_BLOCK = 1 << 22  # random numbers that are drawn at once


@dataclass(frozen=True)
class SharedMatrix:
    """A weight matrix whose elements share few values."""

    codes: Codes
    """[outputs, inputs]: indices into the codebook; 0 where the weight is zero."""
    codebook: NDArray[np.float32]
    """Value of each code, beginning with 0."""

    @property
    def density(self) -> float:
        """Fraction of weights that are not zero."""
        return float(np.count_nonzero(self.codes) / self.codes.size) if self.codes.size else 0.0

    def dense(self) -> NDArray[np.float32]:
        """[outputs, inputs]: the weights."""
        return self.codebook[self.codes]


def shared_matrix(weight: Tensor) -> SharedMatrix:
    """The codes and the codebook of a weight [outputs, inputs] with few distinct values.

    Raises:
        ConfigError: The weight is not a matrix, or its values are not shared.
    """
    if weight.ndim != 2:
        raise ConfigError(f"EIE multiplies matrices by vectors; a {weight.ndim}-D weight is none")
    book = codebook_of(weight, any_repeat=True)
    if book is None:
        raise ConfigError("the weights are not shared: EIE needs a codebook; add a share phase")
    values = torch.cat((book.values.new_zeros(1), book.values))
    return SharedMatrix(book.codes.cpu().numpy().astype(np.uint16), values.float().cpu().numpy())


def artifact_matrices(path: str | os.PathLike[str]) -> dict[str, SharedMatrix]:
    """The matrices with shared values in a .dcz file, by the names of their tensors.

    Convolutions and tensors without shared values are left out: EIE executes only matrix-vector
    products with shared weights.

    Raises:
        trainer.artifact.ArtifactError: The file is damaged or no compressed model.
        OSError: The file cannot be read.
    """
    found = {}
    for name, tensor in artifact.load(path).items():
        is_matrix = tensor.ndim == 2 and tensor.is_floating_point()
        if is_matrix and codebook_of(tensor, any_repeat=True) is not None:
            found[name] = shared_matrix(tensor)
    return found


def random_codes(
    outputs: int, inputs: int, density: float, seed: int = 0, code_bits: int = 4
) -> Codes:
    """[outputs, inputs]: codes of which a fraction `density` is not zero, at random places."""
    generator = np.random.default_rng(seed)
    codes = np.zeros(outputs * inputs, np.uint16)
    for start in range(0, codes.size, _BLOCK):
        block = codes[start : start + _BLOCK]
        kept = generator.random(block.size, np.float32) < density
        block[kept] = generator.integers(1, 1 << code_bits, np.count_nonzero(kept))
    return codes.reshape(outputs, inputs)


def random_activations(inputs: int, density: float, seed: int = 0) -> NDArray[np.float32]:
    """[inputs]: positive activations; exactly round(density * inputs) are not zero."""
    generator = np.random.default_rng(seed)
    activations = np.zeros(inputs, np.float32)
    count = round(density * inputs)
    places = generator.choice(inputs, count, replace=False)
    activations[places] = generator.uniform(0.1, 1.0, count)
    return activations
