"""Records one real run: how often and with what the denoiser is called, and which inputs move from step to step."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dcc.errors import CaptureError
from dcc.record.call import Call, bind
from dcc.record.chains import Seen, chains, moves, positions, sketch, steps_of
from dcc.record.seam import Handler
from dcc.torch_internals import plain_call

MOST_HELD = 64  # values of one input that are held, to see whether each of them is always the same tensor


class StopAfterFirstCall(Exception):
    """Ends a run whose first denoiser call was all that was wanted."""


@dataclass
class Recording:
    """What one run showed. `levels` are the timestep values of its steps, in order.

    `time` is the path of the input that carries the noise level (None where none does), `varying` the tensors that
    change from step to step, `keys` the prompt-side tensors whose identity is stable within a run, `calls` the number
    of denoiser calls. `first` is the first call. `moves` [steps, steps] says how far samples moved (`chains.moves`).
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
    samples: frozenset[str] = frozenset()  # those of `varying` that take the most values
    numbers: tuple[str, ...] = ()  # Python numbers that differ between the calls of a step, but not between steps
    moves: Tensor | None = None

    def sample_path(self, call: Call, dimensions: int = 1) -> str | None:
        """The path of the sampler's state, the largest tensor of at least `dimensions` that moves; None without one."""
        pairs = zip(call.names, call.tensors, strict=True)
        moving = [(n, t.numel()) for n, t in pairs if n in (self.samples or self.varying) and t.dim() >= dimensions]
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
    """What one input was over a run: for each of the calls that had it its value, scalar value, and sketch."""

    at: list[int] = field(default_factory=list)  # the calls
    originals: dict[Hashable, Tensor] = field(default_factory=dict)  # held so that their addresses stay theirs
    values: list[tuple[Hashable, str]] = field(default_factory=list)  # shape and digest
    scalars: list[float | None] = field(default_factory=list)
    sketches: list[Tensor | None] = field(default_factory=list)
    stable: bool = True
    halves: bool = True  # whether its two halves are equal in every call
    dimensions: int = 0
    size: int = 0

    def see(self, call: int, tensor: Tensor) -> None:
        self.at.append(call)
        self.scalars.append(_scalar(tensor))
        self.dimensions, self.size = tensor.dim(), tensor.numel()
        self.halves &= tensor.dim() > 1 and len(tensor) % 2 == 0 and torch.equal(*tensor.chunk(2))
        self.sketches.append(sketch(tensor).cpu() if tensor.dim() > 0 and tensor.is_floating_point() else None)
        value = _value(tensor)
        self.values.append(value)
        if value in self.originals:
            self.stable &= self.originals[value].data_ptr() == tensor.data_ptr()
        elif len(self.originals) < MOST_HELD:
            self.originals[value] = tensor
        else:
            self.stable = False

    def moves_with(self, steps: Sequence[int]) -> bool:
        """Whether it takes other values of the same shape at other steps; `steps` has the step of each call."""
        taken: dict[Hashable, dict[int, set[Hashable]]] = defaultdict(lambda: defaultdict(set))
        for call, (shape, value) in zip(self.at, self.values, strict=True):
            taken[shape][steps[call]].add(value)
        return any(set[Hashable]().union(*at.values()) != max(at.values(), key=len) for at in taken.values())


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
        self.kinds: list[Hashable] = []  # of each call, what its tensors' values and noise level do not tell
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
        self.contexts.append(self.position.name if self.position else None)
        constants = {n: v for n, v in call.constants.items() if not isinstance(v, (int, float)) or isinstance(v, bool)}
        self.kinds.append((self.contexts[-1], call.shapes, tuple(constants.items())))
        for name, value in call.constants.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.numbers.setdefault(name, set()).add(value)
                self.inputs.setdefault(name, _Input()).see(self.calls, torch.tensor(float(value)))
        for name, tensor in zip(call.names, call.tensors, strict=True):
            self.inputs.setdefault(name, _Input()).see(self.calls, tensor)
        self.calls += 1
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
        of_levels = steps_of(scalars or range(self.calls))
        seen = {n: i for n, i in self.inputs.items() if n in self.first.names or n in as_tensors}
        whole = {name: i for name, i in seen.items() if len(i.at) == self.calls}
        varying = {name for name, i in seen.items() if self.once or i.moves_with(of_levels)}
        keys = tuple(name for name, i in whole.items() if name not in varying and i.stable)
        numbers = tuple(name for name in whole if name in as_tensors and name not in varying)
        moving = [seen[name] for name in varying if seen[name].dimensions > 0]
        most = max((len(set(i.values)) for i in moving), default=0)
        samples = {name for name in varying if len(set(seen[name].values)) >= most}
        calls = self._calls(scalars, (*keys, *numbers), samples)
        found = chains(calls)
        places = positions(calls, found)
        levels = tuple(dict(zip(places, scalars, strict=True)).values()) if scalars else ()
        sides = [i for n, i in whole.items() if n not in varying and i.dimensions > 1]
        halves = [seen[name].halves for name in varying if seen[name].dimensions > 1]
        guided = bool(halves) and all(halves) and not all(i.halves for i in sides)
        return Recording(
            self.first, self.calls, time, levels[:1] if self.once else levels, frozenset(varying), keys, as_tensors,
            guided=guided, samples=frozenset(samples), numbers=numbers, moves=moves(calls, found, places),
        )  # fmt: skip

    def _calls(self, scalars: list[float], keys: Sequence[str], samples: set[str]) -> list[Seen]:
        """The calls as `chains` looks at them."""
        tensors = [self.inputs[name] for name in samples if len(self.inputs[name].at) == self.calls]
        sample = max(tensors, key=lambda i: i.size, default=_Input())
        found = []
        for index in range(self.calls):
            key = self.kinds[index], tuple(self.inputs[name].values[index] for name in keys)
            level = scalars[index] if scalars else index
            value, sketched = (sample.values[index], sample.sketches[index]) if sample.values else (None, None)
            found.append(Seen(level, key, value, sketched))
        return found

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


def _value(tensor: Tensor) -> tuple[Hashable, str]:
    """A tensor's shape and type, and a digest that is equal for equal values."""
    data = tensor.detach().cpu().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
    return (tensor.shape, tensor.dtype), hashlib.blake2b(data.data).hexdigest()
