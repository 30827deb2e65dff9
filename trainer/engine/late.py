"""Values that are read from the device later, so that the host need not wait for them."""

import torch
from torch import Tensor


class LateValue:
    """A number on its way from the device to the host.

    Calling it waits for the work that was launched before it was made, and not for what was
    launched since.
    """

    def __init__(self, value: Tensor) -> None:
        """Args: value: 0-dim; may be overwritten afterwards."""
        self._event: torch.cuda.Event | None = None
        if value.is_cuda:
            self._host = torch.empty_like(value, device="cpu", pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = value.detach().clone()

    def __call__(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._host)


def reads_late(device: torch.device, ranks: int) -> bool:
    """Whether losses are read one step late.

    That is so on a single GPU. With several, the host waits for the other ranks in each step
    anyway, where a silent one is noticed.
    """
    return device.type == "cuda" and ranks == 1
