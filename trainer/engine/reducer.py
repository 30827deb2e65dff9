"""Averages gradients over all ranks while the backward pass is still running.

Parameters are assigned to buckets once, at construction, from the last to the first, which is
roughly the order in which backward finishes them. DDP rebuilds its buckets after the first step, so
that a resumed run sums in another order than an uninterrupted one; here the order never changes.
How a bucket is averaged is the business of ring.py.
"""

import functools
import queue
import sys
import threading
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.config import AllReduceConfig
from trainer.engine.lossy.base import LossyAllReduce, Part
from trainer.engine.lossy.make import make_lossy
from trainer.engine.ring import WIRE_TYPES, AllReduce, NativeAllReduce, RingAllReduce
from trainer.engine.world import World

_FEWEST_BUCKETS = 8  # into which gradients are divided, unless that makes them smaller than this:
_SMALL_BYTES = 256 * 1024
_CLOSE_S = 1.0  # seconds; the thread ends at once unless the back end holds it until its time-out

_setting_threads = threading.Lock()  # held while torch's number of threads is changed and restored


class Reducer:
    """Averages the gradients of `parameters` over the ranks of `world`, step after step:

        reducer.zero_grad()  # before the first micro-batch of a step
        reducer.arm()        # before the backward pass of the last one
        reducer.finish()     # after it: every .grad is the mean, with the same bits on all ranks

    From `arm` on, a bucket is sent as soon as it and all buckets before it are complete: by another
    thread, or on CUDA on another stream. Between ranks of one host, where waiting takes processor
    time from backward, small buckets wait until they hold `config.bucket_mb`.

    Call no collective of `world` before `finish`. A rank without a gradient of some parameter
    contributes zero to its mean; where no rank has one, `.grad` stays None, so that the optimizer
    leaves the parameter alone. Sparse gradients become dense. After `finish`, gradients are views
    of the buckets. A world of one has neither buckets nor hooks.

    Attributes:
        extra: float32 [extras], averaged along with the gradients, without rounding to the wire
            type. Set it before `arm`.
        sent_bytes: What this rank sent in the last finished step.
        keeps_state: Whether the mean of a step depends on earlier steps.

    Args:
        parameters: Those that require no gradient are ignored.
        world: All its ranks construct a reducer at the same time, for the same parameters.
        config: Algorithm, wire type and bucket size.
        extras: Number of values in `extra`.

    Raises:
        ValueError: A parameter cannot be averaged, or the parameters differ between ranks.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        world: World,
        config: AllReduceConfig,
        extras: int = 0,
    ) -> None:
        self.sent_bytes = 0
        self.keeps_state = world.size > 1 and config.is_lossy
        self.synchronizes = True  # see `LocalSteps`
        self.extra = torch.zeros(extras, device=world.device)
        self._world = world
        every = list(parameters)
        self._positions = [number for number, p in enumerate(every) if p.requires_grad]
        self._parameters = [every[number] for number in self._positions]
        self._buckets: list[_Bucket] = []
        self._lossy: list[LossyAllReduce] = []  # in the order of the pieces that they average
        self._launched = 0  # buckets that have been sent in this step
        self._armed = False
        self._hooks: list[RemovableHandle] = []
        if world.size == 1:
            return
        bucket_bytes = _bucket_bytes(self._parameters, config, world.device)
        self._least_bytes = _most_bytes(config) if world.transport.quick else 0  # sent at a time
        _check(self._parameters, bucket_bytes, world)
        # One more extra: how many parameters have no gradient on some rank.
        self._buckets = _assign(self._parameters, bucket_bytes, config, extras + 1, world.device)
        self.extra, self._absent = self._buckets[-1].flat[-extras - 1 :].split((extras, 1))
        exact = {
            bucket.wire: _all_reduce(world, config, bucket.wire)
            for bucket in self._buckets
            if bucket.wire is not None
        }
        self._lossy = _make_lossy(self._buckets, world, config)
        lossy = iter(self._lossy)
        for bucket in self._buckets:
            for _ in bucket.pieces:
                bucket.all_reduces.append(
                    next(lossy) if bucket.wire is None else exact[bucket.wire]
                )
        self._finished = [one.state() for one in self._lossy]  # their states after the last step
        self._sent_before = 0  # by this reducer, up to the last finished step
        self._sender: _Sender = _Stream() if world.device.type == "cuda" else _Thread()
        for bucket in self._buckets:
            for position, parameter in enumerate(bucket.parameters):
                hook = functools.partial(self._on_gradient, bucket, position)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def zero_grad(self) -> None:
        """Set every gradient to None. Backward then has nothing to add to: two passes less."""
        for parameter in self._parameters:
            parameter.grad = None

    def arm(self) -> None:
        """Let the next backward pass send the gradients that it finishes."""
        self._armed = True

    def finish(self) -> None:
        """Send the remaining gradients, and wait until every gradient is the mean.

        Raises:
            ConnectionError: A rank is gone. Close the reducer and the world.
            TimeoutError: A rank is silent. Close the reducer and the world.
        """
        if self._world.size == 1:
            for parameter in self._parameters:
                if parameter.grad is not None and parameter.grad.layout != torch.strided:
                    parameter.grad = parameter.grad.to_dense()
            return
        present = [p.grad is not None for p in self._parameters]
        for bucket in self._buckets:
            for position in sorted(bucket.missing):
                bucket.take(position)
        if not all(present):  # the last bucket has not been sent then
            self._absent.fill_(present.count(False))
        self._launch_complete()
        with self._world.heartbeat.busy():
            self._sender.wait()
        if bool(self._absent):
            self._drop_absent(present)
        self._absent.zero_()
        for bucket in self._buckets:
            bucket.reset()
        self._launched = 0
        self._armed = False
        self._finished = [one.state() for one in self._lossy]
        sent = sum(all_reduce.sent_bytes for all_reduce in self._distinct())
        self.sent_bytes, self._sent_before = sent - self._sent_before, sent

    def end_step(self) -> None:
        """The optimizer has updated the weights, which are the same on all ranks."""

    def rescale(self, factor: float) -> None:
        """The gradients of the next steps are `factor` times as large, and so is their error."""
        if factor != 1:
            for one in self._lossy:
                one.rescale(factor)

    def state(self) -> dict[str, Any]:
        """What a checkpoint after the last finished step needs that is the same on all ranks."""
        return {"layout": self._layout(), "pieces": self._finished}

    def rank_state(self) -> dict[str, Any]:
        """What a checkpoint needs of this rank; empty if that is nothing."""
        pieces = [one.rank_state() for one in self._lossy]
        return {"pieces": pieces} if any(pieces) else {}

    def load(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> bool:
        """Continue from what `state` and `rank_state` returned after a step.

        A state of other parameters, as when some were frozen then, is ignored: a reducer that is
        built when parameters are unfrozen has none either.

        Returns:
            Whether the state is one of these parameters.
        """
        if state["layout"] != self._layout():
            return False
        errors = rank_state.get("pieces", [{}] * len(self._lossy))
        for one, piece, error in zip(self._lossy, state["pieces"], errors, strict=True):
            one.load(piece, error)
        self._finished = state["pieces"]
        return True

    def close(self) -> None:
        """Remove the hooks and end the thread; calling it again has no effect.

        In the middle of a step this also closes the world, so that no rank waits for another.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._world.size > 1:
            if self._armed or self._launched:
                self._world.close()
            self._sender.close()

    def _distinct(self) -> list[AllReduce]:
        """All that average buckets, each once."""
        return list({id(a): a for bucket in self._buckets for a in bucket.all_reduces}.values())

    def _layout(self) -> list[list[int]]:
        """Which parameters are averaged, by position among all, and the sizes of the pieces."""
        sizes = [len(piece) for bucket in self._buckets for piece in bucket.pieces]
        return [self._positions, sizes]

    def _drop_absent(self, present: list[bool]) -> None:
        """Set gradients that no rank has to None. A collective call.

        Args:
            present: Whether this rank has a gradient, for each parameter.
        """
        ranks = torch.tensor(present, dtype=torch.int32, device=self._world.device)
        self._world.all_reduce(ranks)
        for parameter, count in zip(self._parameters, ranks.tolist(), strict=True):
            if count == 0:
                parameter.grad = None

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
        """Send the complete buckets that are next, if they are enough or the last ones."""
        end = self._launched
        while end < len(self._buckets) and not self._buckets[end].missing:
            end += 1
        ready = self._buckets[self._launched : end]
        waits = end < len(self._buckets)
        if waits and sum(bucket.flat.nbytes for bucket in ready) < self._least_bytes:
            return
        for bucket in ready:
            for all_reduce, piece in zip(bucket.all_reduces, bucket.pieces, strict=True):
                self._sender.send(all_reduce, piece)
        self._launched = end


class _Bucket:
    """Gradients one after another in a flat tensor, followed by `extras` other values.

    It is averaged in `pieces`, one after another: several if it holds a parameter of more than
    `max_bytes`. The work memory of a piece is enough then.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        wire: torch.dtype | None,  # None: the average is lossy
        extras: int,
        device: torch.device,
        max_bytes: int,
    ) -> None:
        length = sum(p.numel() for p in parameters) + extras
        dtype = parameters[0].dtype if parameters else torch.float32
        self.parameters = parameters
        self.wire = wire
        self.flat = torch.zeros(length, dtype=dtype, device=device)
        self.views: list[Tensor] = []  # with the strides of the parameters, channels_last included
        offset = 0
        for parameter in parameters:
            strides = torch.empty_like(parameter, device="meta").stride()
            self.views.append(self.flat.as_strided(parameter.shape, strides, offset))
            offset += parameter.numel()
        large = any(p.nbytes > max_bytes for p in parameters)
        self.all_reduces: list[AllReduce] = []  # one for each piece
        self.pieces = self.flat.tensor_split(-(-self.flat.nbytes // max_bytes) if large else 1)
        self.reset()

    def reset(self) -> None:
        """Begin a step."""
        self.missing = set(range(len(self.parameters)))  # positions not yet copied into `flat`

    def take(self, position: int) -> None:
        """Copy a parameter's gradient into `flat`, and make that view its .grad."""
        parameter, view = self.parameters[position], self.views[position]
        if parameter.grad is None:
            view.zero_()
        elif parameter.grad.layout != torch.strided:
            view.copy_(parameter.grad.to_dense())
        elif parameter.grad is not view:
            view.copy_(parameter.grad)
        parameter.grad = view
        self.missing.discard(position)


class _Sender(Protocol):
    """Averages tensor after tensor, in order, while the caller continues."""

    def send(self, all_reduce: AllReduce, flat: Tensor) -> None: ...
    def wait(self) -> None: ...
    def close(self) -> None: ...


class _Stream:
    """CUDA: the kernels run on a stream of their own, beside those of backward."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def send(self, all_reduce: AllReduce, flat: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            all_reduce.mean_(flat)

    def wait(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)
        self._stream.synchronize()  # silent ranks are waited for here, not where values are read

    def close(self) -> None:
        pass  # the stream ends with its last reference


class _Thread:
    """CPU: another thread; sockets and sums release the interpreter lock."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[AllReduce, Tensor] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._pending = 0
        self._thread = threading.Thread(target=self._run, name="reducer", daemon=True)
        with _setting_threads:
            threads = torch.get_num_threads()
            self._thread.start()
            self._done.get()
            torch.set_num_threads(threads)

    def send(self, all_reduce: AllReduce, flat: Tensor) -> None:
        self._pending += 1
        self._queue.put((all_reduce, flat))

    def wait(self) -> None:
        failure = None
        while self._pending:
            failure = self._done.get() or failure
            self._pending -= 1
        if failure is not None:
            raise failure

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        # Memory limits these sums, not the processor, and a second team of threads would slow
        # backward down. The number belongs to this thread, but threads that start later inherit
        # it: hence the constructor restores it.
        torch.set_num_threads(1)
        self._done.put(None)
        failure: Exception | None = None
        while (job := self._queue.get()) is not None:
            all_reduce, flat = job
            if failure is None:  # after an error the ranks are out of step: send nothing more
                try:
                    all_reduce.mean_(flat)
                except Exception as error:
                    failure = error
            self._done.put(failure)


def _all_reduce(world: World, config: AllReduceConfig, wire: torch.dtype) -> AllReduce:
    if config.algorithm == "native":
        return NativeAllReduce(world.native_all_reduce, world.size, wire)
    return RingAllReduce(world.transport, wire, config.segment_kb * 1024)


def _make_lossy(
    buckets: list[_Bucket], world: World, config: AllReduceConfig
) -> list[LossyAllReduce]:
    """An average for each piece of the buckets that have no exact one, in their order."""
    if not config.is_lossy:
        return []
    all_reduce = _all_reduce(world, config, WIRE_TYPES.get(config.wire, torch.float32))
    only_averages = config.compression == "powersgd"  # so it needs no connection to every rank
    transport = world.transport if only_averages else world.mesh_transport()
    parts = [
        Part([p.shape for p in bucket.parameters], transport, all_reduce)
        for bucket in buckets
        if bucket.wire is None
        for _ in bucket.pieces
    ]
    return make_lossy(parts, config)


def _most_bytes(config: AllReduceConfig) -> int:
    return max(1, int(config.bucket_mb * 2**20))


def _bucket_bytes(
    parameters: list[nn.Parameter], config: AllReduceConfig, device: torch.device
) -> int:
    """Size at which a bucket ends.

    A small model gets smaller buckets than the setting asks for, so that most of its gradients are
    sent while backward runs. Not on CUDA, where each bucket launches kernels, and not where the
    average of a bucket is lossy, because then the size changes what is lost. It does not depend on
    where the ranks are: the order of summation is the same on one host and on several.
    """
    if config.is_lossy or device.type == "cuda":
        return _most_bytes(config)
    share = sum(p.nbytes for p in parameters) // _FEWEST_BUCKETS
    return min(_most_bytes(config), max(_SMALL_BYTES, share))


def _assign(
    parameters: list[nn.Parameter],
    bucket_bytes: int,
    config: AllReduceConfig,
    extras: int,
    device: torch.device,
) -> list[_Bucket]:
    """Buckets from the last parameter to the first; each ends once it holds `bucket_bytes`.

    A parameter larger than that has a bucket of its own, so that nothing waits for it; it has one
    piece where `config.compression` needs the whole. The parameters of a bucket have one type. The
    extras follow the gradient of the first parameter where they travel in float32, and else have a
    bucket of their own: counts and losses must not be rounded, and a loss may exceed the range of
    float16.
    """
    groups: list[list[nn.Parameter]] = [[]]
    for parameter in reversed(parameters):
        group = groups[-1]
        if group and (
            group[0].dtype != parameter.dtype
            or sum(p.nbytes for p in group) >= bucket_bytes
            or parameter.nbytes > bucket_bytes
        ):
            group = []
            groups.append(group)
        group.append(parameter)
    wire = None if config.is_lossy else WIRE_TYPES[config.wire]
    exact = wire == torch.float32 and all(p.dtype == torch.float32 for p in groups[-1])
    if groups[-1] and not exact:
        groups.append([])
    most_bytes = _most_bytes(config)
    max_bytes = most_bytes if config.compression == "none" else sys.maxsize
    buckets = [_Bucket(group, wire, 0, device, max_bytes) for group in groups[:-1]]
    return [*buckets, _Bucket(groups[-1], torch.float32, extras, device, most_bytes)]


def _check(parameters: list[nn.Parameter], bucket_bytes: int, world: World) -> None:
    """Raise ValueError for parameters that cannot be averaged, or that differ between ranks."""
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
