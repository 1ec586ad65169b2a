"""Records one real run: how often and with what the denoiser is called, and which inputs move from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dcc.errors import CaptureError
from dcc.record.call import Call, bind
from dcc.record.seam import Handler
from dcc.torch_internals import plain_call

MAX_STREAMS = 3  # an input that takes more distinct values than this in a run moves with the steps


class StopAfterFirstCall(Exception):
    """Ends a run whose first denoiser call was all that was wanted."""


@dataclass
class Recording:
    """What one run showed. `levels` are the timestep values of the first stream's calls, in order.

    `time` is the path of the input that carries the noise level (None where none does), `varying` the tensors that
    change from step to step, `keys` the prompt-side tensors whose identity is stable within a run, `calls` the number
    of denoiser calls. `first` is the first call.
    """

    first: Call
    calls: int
    time: str | None
    levels: tuple[float, ...]
    varying: frozenset[str]
    keys: tuple[str, ...]
    as_tensors: frozenset[str]
    gradients: bool = False  # the loop differentiates through the denoiser
    restless: bool = False  # the denoiser's state was not the same at every call
    others: tuple[str, ...] = ()  # further denoisers of the pipeline that ran, as "name (calls)"
    guided: bool = False  # at every call both halves of the batch hold equal samples; prompt-side inputs differ

    def sample_path(self, call: Call, dimensions: int = 1) -> str | None:
        """The path of the sampler's state, the largest tensor of at least `dimensions` that moves; None without one."""
        pairs = zip(call.names, call.tensors, strict=True)
        moving = [(n, t.numel()) for n, t in pairs if n in self.varying and t.dim() >= dimensions]
        return max(moving, key=lambda item: item[1])[0] if moving else None

    def batch_of(self, call: Call) -> int:
        """How many samples a call has: the first dimension of the sampler's state.

        Raises CaptureError where no input of the denoiser changes from step to step.
        """
        path = self.sample_path(call)
        if path is None:
            raise CaptureError("no input of this denoiser changes from step to step")
        return call.tensors[call.names.index(path)].shape[0]


@dataclass
class _Input:
    """Distinct values of one input over a run, at most MAX_STREAMS + 1 of them, and its scalar value per call."""

    originals: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    scalars: list[float | None] = field(default_factory=list)
    which: list[int] = field(default_factory=list)  # per call, the index of its value among `values`
    stable: bool = True
    halves: bool = True  # whether its two halves are equal in every call

    def see(self, tensor: Tensor) -> None:
        self.scalars.append(_scalar(tensor))
        self.halves &= tensor.dim() > 1 and len(tensor) % 2 == 0 and torch.equal(*tensor.chunk(2))
        for index, (original, value) in enumerate(zip(self.originals, self.values, strict=True)):
            if value.shape == tensor.shape and torch.equal(value, tensor):
                self.stable &= original.data_ptr() == tensor.data_ptr()
                self.which.append(index)
                return
        self.which.append(len(self.values))
        if len(self.values) <= MAX_STREAMS:
            self.originals.append(tensor)
            self.values.append(tensor.clone())


class Recorder(Handler):
    """Watches the denoiser during one run and remembers its calls.

    `at_first` is given the first call, inside that call, and ends the run; `at_call` is called inside every call;
    `as_tensors` names numbers that move.
    """

    def __init__(
        self,
        module: nn.Module,
        at_first: Callable[[Call], None] | None = None,
        as_tensors: frozenset[str] = frozenset(),
        at_call: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(module)
        self.at_first, self.as_tensors, self.at_call = at_first, as_tensors, at_call
        self.first: Call | None = None
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})  # its arguments
        self.contexts: list[str | None] = []
        self.numbers: dict[str, set[float]] = {}
        self.inputs: dict[str, _Input] = {}
        self.calls = 0

    def call(self, *args: Any, **kwargs: Any) -> Any:
        call = bind(self.module, args, kwargs, self.as_tensors)
        if self.first is None:
            self.first, self.given = call.detached(), (args, kwargs)
            if self.at_first is not None:
                with torch.no_grad():
                    self.at_first(call)
                raise StopAfterFirstCall
        if self.at_call is not None:
            self.at_call()
        self.calls += 1
        self.contexts.append(self.position.name if self.position else None)
        for name, value in call.constants.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.numbers.setdefault(name, set()).add(value)
                self.inputs.setdefault(name, _Input()).see(torch.tensor(float(value)))
        for name, tensor in zip(call.names, call.tensors, strict=True):
            self.inputs.setdefault(name, _Input()).see(tensor)
        return plain_call(self.module)(*args, **kwargs)

    @property
    def once(self) -> bool:
        """Whether the run had one step: no stream was called twice."""
        return len(set(self.contexts)) == self.calls

    def result(self) -> Recording:
        """The run as a Recording. Raises CaptureError where the denoiser was never called."""
        if self.first is None:
            raise CaptureError(f"the run never called the denoiser ({type(self.module).__name__})")
        as_tensors = frozenset(name for name, values in self.numbers.items() if len(values) > 1)
        if as_tensors:
            self.first = bind(self.module, *self.given, as_tensors).detached()
        time, scalars = self._time()
        steps = len(set(scalars)) or self.calls
        per_step = math.ceil(self.calls / steps)
        seen = {n: i for n, i in self.inputs.items() if n in self.first.names or n in as_tensors}
        varying = frozenset(name for name, i in seen.items() if self.once or len(i.values) > min(per_step, MAX_STREAMS))
        fixed = {name: i for name, i in seen.items() if name not in varying and len(i.which) == self.calls}
        streams = list(zip(self.contexts, *(i.which for i in fixed.values()), strict=True))
        levels = tuple(level for level, stream in zip(scalars, streams, strict=False) if stream == streams[0])
        levels = levels[:1] if self.once else levels
        keys = tuple(name for name, i in fixed.items() if i.stable)
        sides = [i.halves for n, i in fixed.items() if i.values[0].dim() > 1 and len(i.values[0]) % 2 == 0]
        moving = [seen[name].halves for name in varying if seen[name].values[0].dim() > 1]
        guided = bool(moving) and all(moving) and not all(sides)
        return Recording(self.first, self.calls, time, levels, varying, keys, as_tensors, guided=guided)

    def _time(self) -> tuple[str | None, list[float]]:
        """The scalar input that takes the most values, and its value at each call."""
        candidates = {
            name: [s for s in i.scalars if s is not None]
            for name, i in self.inputs.items()
            if all(s is not None for s in i.scalars) and (self.once or len(set(i.scalars)) > 1)
        }
        if not candidates:
            return None, []
        name = max(candidates, key=lambda n: len(set(candidates[n])))
        return name, candidates[name]


def _scalar(tensor: Tensor) -> float | None:
    """The value of a tensor of at most one dimension whose elements are all equal, else None."""
    if tensor.dim() > 1 or tensor.numel() == 0 or tensor.is_complex():
        return None
    first = tensor.flatten()[0]
    return float(first) if bool((tensor == first).all()) else None
