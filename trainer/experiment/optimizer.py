"""Whether an optimizer that is not torch's own can train in phases, and be resumed."""

import torch
from torch import Tensor, nn

from trainer.data.datasets import preserved_generators
from trainer.engine.optim import OptimizerSpec, load_state
from trainer.errors import ConfigError, first_line
from trainer.store.serialization import pack, unpack


def check_optimizer(spec: OptimizerSpec) -> None:
    """Try an optimizer on two small parameters, and resume it from a checkpoint.

    Raises:
        ConfigError: It needs more than gradients, its state cannot be stored, or what is stored
            does not suffice to continue.
    """
    kind = spec.kind
    if kind.__module__.startswith("torch.optim"):
        return
    with preserved_generators():
        first = [torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(0.1, 0.5, 3)]
        parameters, optimizer = _begin(spec, first)
        try:
            for seed in range(2):
                _step(optimizer, parameters, seed)
        except Exception as error:  # of the user's own code
            raise ConfigError(
                f"optimizer: {kind.__name__} cannot make a step from gradients alone: "
                f"{type(error).__name__}: {first_line(error)}; optimizers that evaluate the loss "
                "(closures), or that must be switched between modes, are not supported"
            ) from error
        try:
            state = unpack(pack(optimizer.state_dict()))
        except TypeError as error:
            raise ConfigError(
                f"optimizer: the state of {kind.__name__} does not fit into a checkpoint, which "
                f"holds tensors and plain values: {error}"
            ) from error
        others, resumed = _begin(spec, [p.detach().clone() for p in parameters])
        try:
            load_state(resumed, state)
            for one, other in ((optimizer, parameters), (resumed, others)):
                _step(one, other, 2)
            same = all(map(torch.equal, parameters, others))
        except Exception:  # of the user's own code
            same = False
        if not same:
            raise ConfigError(
                f"optimizer: the state_dict of {kind.__name__} does not hold all that it needs to "
                "continue, so that a resumed run would differ; keep it in optimizer.state or in "
                "the parameter groups"
            )


def _begin(
    spec: OptimizerSpec, values: list[Tensor]
) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    parameters = [nn.Parameter(value) for value in values]
    return parameters, spec.build(parameters)


def _step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.grad = parameter.detach().sin() + 0.1 * seed
    optimizer.step()
