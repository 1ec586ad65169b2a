"""What the denoiser saw and returned in a real run: the data that forecasts are fitted to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dcc.record.call import bind
from dcc.record.recorder import Recording
from dcc.record.seam import Handler
from dcc.torch_internals import pytree

COORDINATES = 32768  # values kept of each sample; a fit of a few coefficients needs no more


@dataclass
class Trace:
    """One uncached batch. `samples[step]` is [n, d], the sampler's state as the denoiser got it; `outputs[step]` is
    [parts, n, d], what it returned: a part for every call of a step and every half of a merged batch. Float32.

    `final` [n, d] is the state after the last step, None where the loop does not show it. `d` counts the coordinates
    that are kept, the same ones of every sample.
    """

    samples: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    final: Tensor | None = None


class Layout:
    """How the calls of a run are laid out: calls per step, and how a call's batch splits into halves of `n` samples."""

    def __init__(self, recording: Recording, n: int) -> None:
        self.sample_name = recording.sample_path(recording.first, dimensions=2) or ""
        self.steps = len(recording.levels)
        self.calls = recording.calls // self.steps if recording.calls % self.steps == 0 else 0
        self.n = n

    def state(self, sample: Tensor) -> Tensor:
        """The state [n, d] in the denoiser's sample input; the halves of a merged batch hold the same."""
        halves = self.split(sample)
        return halves[0]

    def split(self, value: Tensor) -> Tensor:
        """A value [parts * n, ...] as [parts, n, d], at the coordinates that are kept."""
        n = self.n if value.shape[0] % self.n == 0 else value.shape[0]
        flat = value.detach().reshape(value.shape[0] // n, n, -1)
        return flat[..., coordinates(flat.shape[-1]).to(flat.device)].float()


def coordinates(size: int) -> Tensor:
    """Which of `size` values are kept, by index: all, or a fixed random choice."""
    if size <= COORDINATES:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:COORDINATES].sort().values


class Tracer(Handler):
    """Watches the denoiser during one uncached run and fills `trace`."""

    def __init__(self, module: nn.Module, recording: Recording, layout: Layout) -> None:
        super().__init__(module)
        self.recording, self.layout, self.trace = recording, layout, Trace()
        self.parts: list[Tensor] = []

    def call(self, *args: Any, **kwargs: Any) -> Any:
        call = bind(self.module, args, kwargs, self.recording.as_tensors)
        outputs = self.module(*args, **kwargs)
        by_name = dict(zip(call.names, call.tensors, strict=True))
        if not self.parts:
            self.trace.samples.append(self.layout.state(by_name[self.layout.sample_name]))
        self.parts.append(self.layout.split(first_tensor(outputs)))
        if len(self.parts) == self.layout.calls:
            self.trace.outputs.append(torch.cat(self.parts))
            self.parts.clear()
        return outputs


def first_tensor(outputs: Any) -> Tensor:
    """The first tensor that a denoiser returned."""
    return next(value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor))
