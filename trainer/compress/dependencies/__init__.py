"""Which slices of which parameters have to be removed together, so that a smaller model remains.

Removing an output channel of one layer removes the same input channel of every layer that reads it,
the entries of a batch norm between them, and, where two layers are added, the channel of the other
one. Such a set of slices is a `Unit`: a channel, a hidden unit, or an attention head. (Fang et al.,
DepGraph, CVPR 2023, arXiv:2301.12900, find the same sets from a graph of layers.)

The sets are found by a forward pass. Every position along every dimension of a tensor carries a
label, and each operator that torch runs merges labels of positions that stand or fall together: the
rows and columns of a matrix product, the channels of two summands. Zero is the label of what must
stay, such as the pixels of an image, the model's inputs and outputs, and everything that an
operator unknown here has touched.
"""

from trainer.compress.dependencies.units import Part, Unit, output_tensors, removable_units

__all__ = ["Part", "Unit", "output_tensors", "removable_units"]
