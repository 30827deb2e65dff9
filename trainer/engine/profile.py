"""Where the time of a training step is spent, and a trace of some steps: the setting `profile`.

Everything is measured from outside the training loop: `ProfiledRuntime`, `ProfiledSplit` and
`ProfiledObjective` take the places of what the loop calls, so that a run without `profile` executes
none of this code.
"""

import contextlib
import gzip
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, record_function

from trainer.data.split import Split
from trainer.engine.objective import Objective
from trainer.engine.precision import Precision, Update
from trainer.engine.reducer import Reducer
from trainer.engine.ring import AllReduce
from trainer.engine.runtime import Runtime
from trainer.engine.world import World

FIRST_TRACED = 3  # the first step of a phase in the trace; 1 is the first of all
TRACED = 5  # number of steps in the trace
SECTIONS = ("data", "forward", "backward", "communication", "optimizer")


class Profile:
    """The time of the steps of one phase on one rank.

    The first step, which allocates memory, and the traced steps, which are slower, are not counted.

    Attributes:
        steps: Number of steps that are counted.
        trace: The trace in Chrome's format, compressed with gzip; empty before its last step.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        self.trace = b""
        self._device = device
        self._number = 0  # of the current step
        self._begun: float | None = None  # when it began; None between two steps
        self._seconds = dict.fromkeys((*SECTIONS, "all-reduce", "step"), 0.0)  # of all steps
        self._current = dict(self._seconds)  # of the current one
        self._profiler: Any = None  # while it records
        self._lock = threading.Lock()  # the reducer's thread adds its own time

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Add the time of this block to a section of the current step."""
        with record_function(name):
            begun = self._now()
            try:
                yield
            finally:
                self.add(name, self._now() - begun)

    def add(self, name: str, seconds: float) -> None:
        """Add a time to a section of the current step; outside of steps, nothing."""
        with self._lock:
            if self._begun is not None:
                self._current[name] += seconds

    def begin_step(self) -> None:
        """A step begins, unless one has begun."""
        if self._begun is not None:
            return
        self._number += 1
        if self._number == FIRST_TRACED:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints lines for each trace
            every_thread = _ExperimentalConfig(profile_all_threads=True)  # also the reducer's
            self._profiler = torch.profiler.profile(
                activities=activities, experimental_config=every_thread
            )
            self._profiler.start()
        self._current = dict.fromkeys(self._current, 0.0)
        self._begun = self._now()

    def end_step(self) -> None:
        """The optimizer's step is done."""
        assert self._begun is not None
        self.add("step", self._now() - self._begun)
        self._begun = None
        if self._profiler is None and self._number > 1:
            self.steps += 1
            for name, seconds in self._current.items():
                self._seconds[name] += seconds
        elif self._number == FIRST_TRACED + TRACED - 1:
            self.close()

    def close(self) -> None:
        """End the trace, if one is being recorded."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(path))
            self.trace = gzip.compress(path.read_bytes(), mtime=0)

    def milliseconds(self) -> dict[str, float]:
        """The mean time of a step by section. Without any step: zeros.

        The communication of a step is what the all-reduce takes. Exposed is the part for which the
        rank waits after the backward pass, hidden the part during it. The sections but hidden
        communication and the rest add up to the step.
        """
        mean = {name: 1000 * s / max(1, self.steps) for name, s in self._seconds.items()}
        step, exposed = mean.pop("step"), mean.pop("communication")
        hidden = max(0.0, mean.pop("all-reduce") - exposed)
        rest = max(0.0, step - exposed - sum(mean.values()))
        return {
            "step": step,
            **mean,
            "exposed_communication": exposed,
            "hidden_communication": hidden,
            "rest": rest,
        }

    def _now(self) -> float:
        """The time in seconds, once the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return time.perf_counter()


def all_profiles(profile: Profile, world: World) -> tuple[dict[str, Any], list[bytes]]:
    """The profiles of all ranks, for a `PhaseRecord`, and their traces. A collective call.

    Both are complete on rank 0, and empty on the others.
    """
    own = {name: round(value, 4) for name, value in profile.milliseconds().items()}
    ranks = [json.loads(content) for content in world.gather(json.dumps(own).encode())]
    traces = [trace for trace in world.gather(profile.trace) if trace]
    return {"steps": profile.steps, "ranks": ranks}, traces


@dataclass(frozen=True)
class ProfiledRuntime(Runtime):
    """A runtime whose optimizer, backward pass and reducer are measured. Made by `of`."""

    base: Runtime | None = None
    profile: Profile | None = None

    @classmethod
    def of(cls, runtime: Runtime, profile: Profile) -> "ProfiledRuntime":
        """The same runtime, measured by `profile`."""
        fields = {name: getattr(runtime, name) for name in Runtime.__dataclass_fields__}
        return cls(**fields, base=runtime, profile=profile)

    @cached_property
    def mixed_precision(self) -> Precision:
        """That of the runtime itself, whose loss scale lasts longer than this phase."""
        assert self.base is not None
        assert self.profile is not None
        return _Precision(self.base.mixed_precision, self.profile)

    def reducer(self, parameters: Iterable[nn.Parameter], extras: int) -> Reducer:
        assert self.profile is not None
        return _Reducer(self, extras, self.profile, parameters)

    def place_batch(self, inputs: Any, targets: Tensor) -> tuple[Any, Tensor]:
        assert self.profile is not None
        with self.profile.section("data"):
            return super().place_batch(inputs, targets)


class _Precision(Precision):
    """Shares the loss scaler of another object."""

    def __init__(self, other: Precision, profile: Profile) -> None:
        self.__dict__.update(other.__dict__)
        self._profile = profile

    def backward(self, loss: Tensor) -> None:
        with self._profile.section("backward"):
            super().backward(loss)

    def step(self, *args: Any) -> Update:
        with self._profile.section("optimizer"):
            update = super().step(*args)
        self._profile.end_step()
        return update


class _Reducer(Reducer):
    def __init__(
        self, runtime: Runtime, extras: int, profile: Profile, parameters: Iterable[nn.Parameter]
    ) -> None:
        super().__init__(parameters, runtime.world, runtime.allreduce, extras)
        self._profile = profile
        if runtime.world.size > 1:
            timed = {id(one): _AllReduce(one, profile) for one in self._distinct()}
            self._timed = list(timed.values())
            for bucket in self._buckets:
                bucket.all_reduces = [timed[id(one)] for one in bucket.all_reduces]

    def zero_grad(self) -> None:
        self._profile.begin_step()
        super().zero_grad()

    def finish(self) -> None:
        with self._profile.section("communication"):
            super().finish()
        if self._world.device.type == "cuda" and self._world.size > 1:
            for one in self._timed:
                one.add_events()


class _AllReduce:
    """Measures another one, in the thread or on the stream that executes it."""

    def __init__(self, inner: AllReduce, profile: Profile) -> None:
        self.sent_bytes = 0
        self._inner = inner
        self._profile = profile
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def mean_(self, flat: Tensor) -> None:
        if flat.is_cuda:  # to wait for it here would end the overlap with backward
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self._inner.mean_(flat)
            end.record()
            self._events.append((begin, end))
        else:
            with self._profile.section("all-reduce"):
                self._inner.mean_(flat)
        self.sent_bytes = self._inner.sent_bytes

    def add_events(self) -> None:
        """Add the times of the kernels, which are done."""
        for begin, end in self._events:
            self._profile.add("all-reduce", begin.elapsed_time(end) / 1000)
        self._events.clear()


class ProfiledSplit:
    """A `Split` whose batches are measured."""

    def __init__(self, split: Split, profile: Profile) -> None:
        self.split = split
        self._profile = profile

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, order: Iterable[Tensor], epoch: int | None) -> Iterator[tuple[Any, Tensor]]:
        """See `Split`."""
        batches = self.split.batches(order, epoch)
        while True:
            with self._profile.section("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


class ProfiledObjective:
    """An `Objective` that is measured: the forward pass and the loss."""

    def __init__(self, objective: Objective, profile: Profile) -> None:
        self._objective = objective
        self._profile = profile

    def __call__(self, model: nn.Module, inputs: Any, targets: Tensor, units: float) -> Tensor:
        with self._profile.section("forward"):
            return self._objective(model, inputs, targets, units)
