"""Says of a run whose values are not finite at which step that began, so that an error can name prompt and step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcc import arguments
from dcc.discover.subject import Subject
from dcc.record.recorder import Recording
from dcc.record.seam import Handler
from dcc.record.target import installed
from dcc.torch_internals import pytree


def all_finite(*values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(value.isfinite().all()) for value in values)


def not_finite(subject: Subject, prompt: Any, seed: int, name: str) -> str:
    """A sentence on a prompt whose uncached run is not finite; the prompt is run once more to find the step.

    `name` is what the caller's prompt is called, such as "prompt 3".
    """
    watch = _Watch(subject)
    with installed(subject.target, watch), torch.no_grad():
        subject.target.generate([prompt], [seed])
    if watch.first is None:
        where = "although all that the denoiser returns is finite: the loop or the decoder makes them"
    else:
        where = f"from what the denoiser returns at step {step_of(watch.first, subject.run) + 1} of {subject.steps} on"
    return (
        f"{name} ({arguments.shown(prompt)}): its uncached run has values that are not finite (NaN or infinite), "
        f"{where}. Nothing can be compared with it: leave it out, or check the dtype and the arguments of the call"
    )


def step_of(call: int, run: Recording) -> int:
    """The step of the n-th call of a run, from 0."""
    return call * len(run.levels) // max(run.calls, 1)


class _Watch(Handler):
    """Runs the denoiser as it is; `first` is the number of the first call that returned something not finite."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject.module)
        self.calls = 0
        self.first: int | None = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.module(*args, **kwargs)
        if self.first is None and not all_finite(*(v for v in pytree.tree_leaves(outputs) if isinstance(v, Tensor))):
            self.first = self.calls
        self.calls += 1
        return outputs
