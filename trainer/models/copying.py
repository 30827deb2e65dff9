"""Deep copies of models."""

import copy

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def copy_model(model: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
    """A deep copy, also of a model that keeps tensors which it has computed with a gradient.

    torch cannot copy the graph of such a tensor, for example of the attribute `weight` of the old
    weight_norm, or of the attention that a layer stores: the copy has its values only.

    Args:
        model: The model, which stays as it is.
        memo: As for `copy.deepcopy`: what takes the place of objects, by their ids.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for kept in tree_leaves(vars(module)):
            if isinstance(kept, Tensor) and not kept.is_leaf:
                memo.setdefault(id(kept), kept.detach().clone())
    return copy.deepcopy(model, memo)
