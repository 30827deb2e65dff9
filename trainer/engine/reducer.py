"""Gradients to their mean over all ranks, while backward is still running.

Parameters are laid out in buckets once, at construction, from the last to the first, which is about
the order in which backward finishes them. DDP rebuilds its buckets after the first step, and so a
resumed run sums in another order than an undisturbed one; here the order never changes. How a
bucket is averaged is not known here (ring.py).
"""

import functools
import queue
import threading
import zlib
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.config import AllReduceConfig
from trainer.engine.ring import WIRE_TYPES, AllReduce, NativeAllReduce, RingAllReduce
from trainer.engine.world import World

_CLOSE_S = 1.0  # for a thread that ends at once, unless the back end holds it until its time-out

_threads_setting = threading.Lock()  # torch's number of threads, while it is changed and set back


class Reducer:
    """Averages the gradients of `parameters` over the ranks of `world`, step after step:

        reducer.zero_grad()  # before the first micro-batch of a step
        reducer.arm()        # before the backward pass of the last one
        reducer.finish()     # after it: every .grad is the mean, with the same bits on all ranks

    From `arm` on, a bucket leaves as soon as it and all buckets before it are complete: on a thread
    of its own, on CUDA on a stream of its own. Use no collective of `world` before `finish`. A
    parameter that got no gradient, on this rank or on all, counts as zero; one that requires none
    is left alone. After `finish`, gradients are views of the buckets.

    `extra` is a 1-D tensor of `extras` more values, averaged and rounded like the gradients: set
    them before `arm`. `sent_bytes` is the payload that this rank sent in the last finished step.
    In a world of one there are no buckets and no hooks.

    Raises ValueError if a parameter cannot be averaged or the parameters differ between ranks.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        world: World,
        config: AllReduceConfig,
        extras: int = 0,
    ) -> None:
        self.sent_bytes = 0
        self.extra = torch.zeros(extras, device=world.device)
        self._world = world
        self._parameters = [p for p in parameters if p.requires_grad]
        self._buckets: list[_Bucket] = []
        self._launched = 0  # buckets that have left in this step
        self._armed = False
        self._hooks: list[RemovableHandle] = []
        if world.size == 1:
            return
        bucket_bytes = int(config.bucket_mb * 2**20)
        _check(self._parameters, bucket_bytes, world)
        self._buckets = _lay_out(self._parameters, bucket_bytes, extras, world.device)
        if extras:
            self.extra = self._buckets[-1].flat[-extras:]
        self._all_reduce = _all_reduce(world, config)
        self._sent_before = 0  # by this reducer, up to the last finished step
        self._sender: _Sender = (
            _Stream(self._all_reduce) if world.device.type == "cuda" else _Thread(self._all_reduce)
        )
        for bucket in self._buckets:
            for position, parameter in enumerate(bucket.parameters):
                hook = functools.partial(self._on_gradient, bucket, position)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def zero_grad(self) -> None:
        """Forget all gradients. Backward then has nothing to add to, which saves two passes."""
        for parameter in self._parameters:
            parameter.grad = None

    def arm(self) -> None:
        """Let the next backward pass send what it finishes."""
        self._armed = True

    def finish(self) -> None:
        """Send what has not left yet, and wait until every gradient is the mean.

        Raises ConnectionError when a rank is gone, TimeoutError when one is silent; then close the
        reducer and the world.
        """
        if self._world.size == 1:
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            return
        for bucket in self._buckets:
            for position in sorted(bucket.missing):
                bucket.take(position)
        self._launch_complete()
        with self._world.heartbeat.busy():
            self._sender.wait()
        for bucket in self._buckets:
            bucket.reset()
        self._launched = 0
        self._armed = False
        self.sent_bytes = self._all_reduce.sent_bytes - self._sent_before
        self._sent_before = self._all_reduce.sent_bytes

    def close(self) -> None:
        """Let go of the parameters and end the thread; more than once does no harm.

        In the middle of a step this closes the world too, so that neither side waits for the other.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._world.size > 1:
            if self._armed or self._launched:
                self._world.close()
            self._sender.close()

    def _on_gradient(self, bucket: "_Bucket", position: int, parameter: Tensor) -> None:
        """Called by autograd when a parameter's gradient of this backward pass is complete."""
        if not self._armed:
            return
        if position not in bucket.missing:
            raise RuntimeError(
                "a second backward pass after Reducer.arm(): its gradients would be lost; arm the "
                "reducer before the last backward pass of a step, and finish it after that"
            )
        bucket.take(position)
        self._launch_complete()

    def _launch_complete(self) -> None:
        while self._launched < len(self._buckets) and not self._buckets[self._launched].missing:
            self._sender.send(self._buckets[self._launched].flat)
            self._launched += 1


class _Bucket:
    """Gradients side by side in one flat tensor, and `extras` values after them."""

    def __init__(self, parameters: list[nn.Parameter], extras: int, device: torch.device) -> None:
        length = sum(p.numel() for p in parameters) + extras
        dtype = parameters[0].dtype if parameters else torch.float32
        self.parameters = parameters
        self.flat = torch.zeros(length, dtype=dtype, device=device)
        self.views: list[Tensor] = []  # with the strides of the parameters: channels_last stays so
        offset = 0
        for parameter in parameters:
            strides = torch.empty_like(parameter, device="meta").stride()
            self.views.append(self.flat.as_strided(parameter.shape, strides, offset))
            offset += parameter.numel()
        self.reset()

    def reset(self) -> None:
        """Begin a step."""
        self.missing = set(range(len(self.parameters)))  # whose gradients are not in `flat` yet

    def take(self, position: int) -> None:
        """Move a parameter's gradient into `flat`, where its .grad is from now on."""
        parameter, view = self.parameters[position], self.views[position]
        if parameter.grad is None:
            view.zero_()
        elif parameter.grad.layout != torch.strided:
            raise ValueError(
                f"a gradient of shape {tuple(parameter.shape)} is sparse, and only dense ones are "
                "averaged: build its layer with sparse=False"
            )
        elif parameter.grad is not view:
            view.copy_(parameter.grad)
        parameter.grad = view
        self.missing.discard(position)


class _Sender(Protocol):
    """Averages bucket after bucket, in order, while the caller goes on."""

    def send(self, flat: Tensor) -> None: ...
    def wait(self) -> None: ...
    def close(self) -> None: ...


class _Stream:
    """CUDA: the device does the waiting, on a stream beside that of backward."""

    def __init__(self, all_reduce: AllReduce) -> None:
        self._all_reduce = all_reduce
        self._stream = torch.cuda.Stream()

    def send(self, flat: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._all_reduce.mean_(flat)

    def wait(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)
        self._stream.synchronize()  # silent ranks are waited for here, not when `extra` is read

    def close(self) -> None:
        pass  # nothing to end: the stream goes with its last user


class _Thread:
    """CPU: a thread of its own; sockets and sums give the interpreter lock free."""

    def __init__(self, all_reduce: AllReduce) -> None:
        self._all_reduce = all_reduce
        self._todo: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._under_way = 0
        self._thread = threading.Thread(target=self._run, name="reducer", daemon=True)
        with _threads_setting:
            threads = torch.get_num_threads()
            self._thread.start()
            self._done.get()
            torch.set_num_threads(threads)

    def send(self, flat: Tensor) -> None:
        self._under_way += 1
        self._todo.put(flat)

    def wait(self) -> None:
        failure = None
        while self._under_way:
            failure = self._done.get() or failure
            self._under_way -= 1
        if failure is not None:
            raise failure

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        # Sums wait for memory, not for the processor, and a second team of threads would be in the
        # way of backward. The number is this thread's own, but also what new threads start with:
        # hence the constructor sets it back.
        torch.set_num_threads(1)
        self._done.put(None)
        failure: Exception | None = None
        while (flat := self._todo.get()) is not None:
            if failure is None:  # after an error the ranks are out of step: touch nothing more
                try:
                    self._all_reduce.mean_(flat)
                except Exception as error:
                    failure = error
            self._done.put(failure)


def _all_reduce(world: World, config: AllReduceConfig) -> AllReduce:
    wire = WIRE_TYPES[config.wire]
    if config.algorithm == "native":
        return NativeAllReduce(world.all_reduce, world.size, wire)
    return RingAllReduce(world.transport, wire, config.segment_kb * 1024)


def _lay_out(
    parameters: list[nn.Parameter], bucket_bytes: int, extras: int, device: torch.device
) -> list[_Bucket]:
    """Buckets from the last parameter to the first; each ends once it holds `bucket_bytes`.

    A bucket has one type. The extras come last, after the first parameter's gradient.
    """
    groups: list[list[nn.Parameter]] = [[]]
    for parameter in reversed(parameters):
        group = groups[-1]
        if group and (
            group[0].dtype != parameter.dtype or sum(p.nbytes for p in group) >= bucket_bytes
        ):
            group = []
            groups.append(group)
        group.append(parameter)
    return [_Bucket(group, extras if group is groups[-1] else 0, device) for group in groups]


def _check(parameters: list[nn.Parameter], bucket_bytes: int, world: World) -> None:
    """Refuse what cannot be averaged, and ranks whose buckets would differ."""
    for parameter in parameters:
        what = f"a parameter of shape {tuple(parameter.shape)}"
        if parameter.device.type != world.device.type:
            raise ValueError(f"{what} is on {parameter.device}, its worker on {world.device}")
        if parameter.layout != torch.strided or not parameter.is_floating_point():
            raise ValueError(
                f"{what} is {parameter.layout} of {parameter.dtype}: only dense parameters of a "
                "floating type can be averaged"
            )
    layout = [(p.shape, p.stride(), p.dtype) for p in parameters]
    table = torch.zeros(world.size, dtype=torch.int64)
    table[world.rank] = zlib.crc32(f"{bucket_bytes} {layout}".encode())
    world.all_reduce(table)
    if not bool((table == table[0]).all()):
        raise ValueError(
            f"the ranks' parameters or bucket sizes differ (checksums {table.tolist()}): build the "
            "same model with the same settings on all of them"
        )
