"""What quality.py measures: a demo pipeline, and contestants that install themselves on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import dcc
from dcc.policies import make_policy
from dcc.policies.setting import plan_for, setting_of
from dcc.record.target import PipelineTarget

BUDGETS = (2.0, 3.0, 4.0, 5.0, 7.0)
CALIBRATION = 8  # prompts on which policies measure what they need
SLACK = 0.98  # a row counts at a budget from this share of it on, so that 17 of 50 steps count as 3x
Changes = dict[str, Any]  # arguments of the pipeline's call that a contestant changes


class DoesNotRun(Exception):
    """A contestant that cannot run on this pipeline; the message is the reason."""


class Subject:
    """A demo pipeline: how it is called, its clean instance, and what contestants share.

    `changes` are arguments of the call other than the pipeline was trained for, such as fewer steps for a trial.
    """

    def __init__(self, name: str, **changes: Any) -> None:
        self.name, self.call = name, dcc.demo.settings(name) | changes
        self.steps: int = self.call["num_inference_steps"]
        self.pipe = dcc.demo.load(name)

    def fresh(self) -> Any:
        """A new instance of the pipeline, for whoever patches modules."""
        return dcc.demo.load(self.name)

    def target(self, pipe: Any = None, changes: Changes | None = None) -> PipelineTarget:
        """What runs the pipeline from prompts and seeds."""
        return PipelineTarget(pipe or self.pipe, self.call | (changes or {}))

    @cached_property
    def weights(self) -> str:
        """A hash of all weights of the pipeline."""
        digest = hashlib.sha256()
        for path in sorted(Path(dcc.demo.path(self.name)).rglob("*.safetensors")):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    @cached_property
    def compiled(self) -> Any:
        """A CompiledDenoiser of the clean pipeline, whose capture serves every plan."""
        calib = dcc.demo.prompts("calib")
        dcc.compile(self.pipe, calib, policy="interval", interval=1, backend="eager", **self.call)
        net = dcc.compiled(self.pipe)
        dcc.restore(self.pipe)
        return net

    @cached_property
    def sites(self) -> Any:
        """The sites of the denoiser."""
        return self.compiled.subject.sites

    @cached_property
    def setting(self) -> Any:
        """What policies may look at, measured once, on calibration prompts."""
        prompts = dcc.demo.prompts("calib")[:CALIBRATION]
        return setting_of(self.compiled.subject, prompts, progress=lambda line: None)

    def plan(self, policy: str, parameters: dict[str, Any]) -> Any:
        """The plan of a policy for this pipeline; a policy that is calibrated is so on calibration prompts."""
        return plan_for(make_policy(policy, self.setting, parameters), self.compiled.subject, policy, parameters)


Install = Callable[..., AbstractContextManager[Changes | None]]


@dataclass(frozen=True)
class Knob:
    """The parameter that decides how much is computed: `values` from most to least, or a range of a threshold."""

    name: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Contestant:
    """`install(subject, pipe, **parameters)` puts it on a pipeline; `knob` is tuned until `budget` is met."""

    name: str
    family: str
    install: Install
    parameters: dict[str, Any] = field(default_factory=dict)
    knob: Knob | None = None
    budget: float | None = None
    dynamic: bool = False  # decides by what it sees, so prompts must not share a batch
    shared: bool = False  # works on the subject's clean pipeline, does not patch modules


def budgets(variants: Iterable[Contestant]) -> Iterator[Contestant]:
    """Every variant once per budget; a knob keeps the values that can meet it if what is skipped costs nothing."""
    for variant in variants:
        for budget in BUDGETS:
            knob = variant.knob
            if knob and knob.name == "full_steps":
                knob = replace(knob, values=tuple(n for n in knob.values if n * SLACK * budget <= max(knob.values)))
            elif knob and knob.name == "interval":
                knob = replace(knob, values=tuple(n for n in knob.values if n >= budget))
            yield replace(variant, name=f"{variant.name} @ {budget:g}x", budget=budget, knob=knob)


def interval_knob(subject: Subject) -> Knob:
    """Steps between full steps."""
    return Knob("interval", tuple(range(1, subject.steps + 1)))


def count_knob(subject: Subject) -> Knob:
    """Number of full steps."""
    return Knob("full_steps", tuple(range(subject.steps, 1, -1)))


def evenly(steps: int, full: int) -> list[int]:
    """A mask of `full` ones of `steps`, evenly spread from the first step to the last."""
    chosen = {round(i * (steps - 1) / max(full - 1, 1)) for i in range(full)}
    return [int(step in chosen) for step in range(steps)]
