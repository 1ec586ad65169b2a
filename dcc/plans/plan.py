"""The plan: which sites are computed or forecast at which step, with which coefficients. A file a person can read."""

from __future__ import annotations

import bisect
import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from dcc import arguments
from dcc.decisions import Decision
from dcc.errors import PlanError, PolicyError
from dcc.files import parse_json, read_bytes, write_file
from dcc.plans.fields import finite, required, tuples, whole
from dcc.plans.forms import Form, TokensForm, flat, split
from dcc.plans.predictors import Predictor
from dcc.plans.triggers import Trigger

VERSION = 1


@dataclass(frozen=True)
class Plan:
    """A static schedule for one denoiser and one list of noise levels.

    `schedule[step][k]` is the Decision for the sites of selector `sites[k]` at that step; where they are not computed,
    `coefficients[step][k]` weighs their anchors, newest first (empty at computed steps). `levels` are the timestep
    values the denoiser is called with, in order. FLOPs are those of one whole run of one stream.

    Where a `trigger` decides at run time, COMPUTE marks a step that computes whatever the trigger says, coefficients
    are empty, and `predictors` (one per selector) make them when the anchors are known. `forms[k]` says how the sites
    of selector k are forecast where that is not one combination of whole anchors (forms.py), and is None where it is;
    `forms` is empty where all are None. Forms, triggers and predictors may be given as a file holds them.

    `measured` is what the solver saw on prompts it had not fitted to, and `limits` the forecast error at each anchor
    above which a prompt is harder than those the plan was made for (serve/guard.py); both are empty for a policy.
    """

    model: str
    scheduler: str
    levels: tuple[float, ...]
    sites: tuple[str, ...]
    schedule: tuple[tuple[int, ...], ...]
    coefficients: tuple[tuple[tuple[float, ...], ...], ...]
    policy: str
    parameters: dict[str, Any] = field(default_factory=dict)
    flops: int = 0
    flops_uncached: int = 0
    cache_bytes: int = 0
    measured: dict[str, Any] = field(default_factory=dict)
    limits: tuple[float, ...] = ()
    predictors: tuple[Predictor, ...] = ()
    trigger: Trigger | None = None
    forms: tuple[Form | None, ...] = ()

    def __post_init__(self) -> None:
        _read_values(self)
        _check(self)

    @property
    def steps(self) -> int:
        """Number of sampler steps."""
        return len(self.levels)

    @functools.cached_property
    def anchors(self) -> int:
        """J: the largest number of anchors that any forecast reads, at least 1."""
        needed = [predictor.anchors for predictor in self.predictors]
        lengths = [len(c) // self.parts(k) for row in self.coefficients for k, c in enumerate(row)]
        return max([*needed, *lengths], default=1) or 1

    @property
    def steps_mask(self) -> list[int]:
        """1 for a step that computes every site, 0 for one that forecasts some."""
        return [int(is_full(row)) for row in self.schedule]

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """The distinct rows of the schedule, the all-compute row first; each becomes one variant.

        Under a trigger it is that one only: the trigger makes the other rows as it decides.
        """
        return list(self._rows)

    @functools.cached_property
    def _rows(self) -> tuple[tuple[int, ...], ...]:
        full = (int(Decision.COMPUTE),) * len(self.sites)
        others = set() if self.trigger else set(self.schedule) - {full}
        return (full, *sorted(others, reverse=True))

    @functools.cached_property
    def _computed(self) -> tuple[tuple[int, ...], ...]:
        """By selector, the steps that compute its sites."""
        return tuple(
            tuple(step for step, row in enumerate(self.schedule) if row[k] == Decision.COMPUTE)
            for k in range(len(self.sites))
        )

    @property
    def speedup(self) -> float:
        """Expected ratio of denoiser FLOPs, uncached over planned; infinite where nothing at all is computed."""
        if not self.flops_uncached:
            return self.steps / max(sum(self.steps_mask), 1)
        return self.flops_uncached / self.flops if self.flops else math.inf

    def parts(self, selector: int) -> int:
        """How many rows of coefficients, one after another, the selector's form makes one forecast of."""
        form = self.form(selector)
        return form.rows if form else 1

    def form(self, selector: int) -> Form | None:
        """The selector's form; None where it is plain."""
        return self.forms[selector] if self.forms else None

    def weights(self, step: int, selector: int) -> list[tuple[float, ...]]:
        """The coefficients of a step as its form's rows, newest anchor first; empty rows where the step computes."""
        return split(self.coefficients[step][selector], self.parts(selector))

    def anchor_steps(self, step: int, selector: int) -> list[int]:
        """Steps before `step` at which the selector's sites were computed, newest first, as many as are kept."""
        computed = self._computed[selector]
        before = bisect.bisect_left(computed, step)
        return list(computed[max(before - self.anchors, 0) : before][::-1])

    def as_json(self) -> dict[str, Any]:
        """The plan as a file holds it."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["predictors"] = [predictor.as_json() for predictor in self.predictors]
        data["trigger"] = self.trigger.as_json() if self.trigger else {}
        data["forms"] = [form.as_json() if form else {} for form in self.forms]
        return {"dcc_plan": VERSION, **data}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, atomically: `path` holds the old file or the whole new one."""
        arguments.new_file("path", path, PlanError)
        write_file(path, json.dumps(self.as_json(), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan that `save` wrote. Raises PlanError, naming the file and the field, for anything else."""
        arguments.path("path", path, PlanError)
        data = parse_json(read_bytes(path, PlanError), f"{path}: not a dcc plan, it", PlanError)
        if not isinstance(data, dict) or "dcc_plan" not in data:
            raise PlanError(f"{path}: not a dcc plan, the field 'dcc_plan' is missing")
        version = data.pop("dcc_plan")
        if version != VERSION or not whole(version):
            raise PlanError(f"{path}: written by another version of dcc; this one reads plans of version {VERSION}")
        try:
            known = [field.name for field in fields(cls)]
            missing, unknown = [n for n in required(cls) if n not in data], [n for n in data if n not in known]
            for name in (*missing, *unknown):
                problem = "is missing" if name in missing else f"is unknown; a plan has: {', '.join(known)}"
                raise PlanError(f"plan field {name!r:.80} {problem}")
            return cls(**{name: tuples(value) for name, value in data.items()})
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def __str__(self) -> str:
        mask = "".join("1" if full else "?" if self.trigger else "0" for full in self.steps_mask)
        parameters = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        lines = [
            f"plan: {self.policy}({parameters})",
            f"  scheduler   {self.scheduler}, {self.steps} steps, levels {self.levels[0]:.4g} to {self.levels[-1]:.4g}",
            f"  steps mask  {mask}  ({sum(self.steps_mask)} full steps of {self.steps})",
        ]
        for k, site in enumerate(self.sites):
            lines.append(f"  site        {site}: {''.join(str(row[k]) for row in self.schedule)}")
        for text in dict.fromkeys(str(form) for form in self.forms if form):
            lines.append(f"  form        {text}")
        if self.trigger:
            written = self.trigger.as_json()
            settings = ", ".join(f"{name}={value}" for name, value in written.items() if name != "kind")
            lines.append(f"  trigger     {self.trigger.kind}({settings}) decides the steps marked ?")
            return "\n".join(lines)
        lines.append(
            f"  expected    {self.speedup:.2f}x fewer FLOPs ({self.flops_uncached / 1e9:.2f} to {self.flops / 1e9:.2f} "
            f"GFLOP per run and stream), {self.cache_bytes / 2**20:.2f} MiB of anchors, "
            f"{len(self.rows)} variants"
        )
        if self.measured:
            lines.append(f"  measured    {describe(self.measured)}")
        return "\n".join(lines)


def is_full(row: Sequence[int]) -> bool:
    """Whether a row of a schedule computes every site."""
    return all(decision == Decision.COMPUTE for decision in row)


def forecast_in(row: Sequence[int]) -> list[int]:
    """The selectors whose sites a row of a schedule does not compute."""
    return [k for k, decision in enumerate(row) if decision != Decision.COMPUTE]


def make_plan(
    *,
    model: str,
    scheduler: str,
    levels: Sequence[float],
    sites: Sequence[str],
    schedule: Sequence[Sequence[int]],
    predictors: Sequence[Predictor],
    policy: str,
    parameters: dict[str, Any],
    trigger: Trigger | None = None,
    forms: Sequence[Any] = (),
) -> Plan:
    """A plan whose coefficients follow from the schedule and one predictor per selector; with a trigger, at run time.

    `forms` are Forms, or objects as a file holds them. The costs are left at 0, because no graph is known here:
    `dcc.variants.cost.planned` makes and prices a plan for one denoiser.

    Raises PlanError where a site is forecast before it was ever computed, and for an object that is no form.
    """
    coefficients = []
    read = _forms_of(forms)
    for step, row in enumerate(schedule):
        values: list[tuple[float, ...]] = []
        for k, decision in enumerate(row):
            anchors = [s for s in range(step - 1, -1, -1) if schedule[s][k] == Decision.COMPUTE]
            if decision != Decision.COMPUTE and not anchors:
                raise PlanError(f"step {step} forecasts {sites[k]!r} before any step computed it; compute step 0")
            free = decision == Decision.COMPUTE or trigger is not None
            values.append(() if free else flat(read[k] if read else None, predictors[k], step, anchors))
        coefficients.append(tuple(values))
    return Plan(
        model,
        scheduler,
        tuple(levels),
        tuple(sites),
        tuple(tuple(int(v) for v in row) for row in schedule),
        tuple(coefficients),
        policy,
        json.loads(json.dumps(parameters)),  # as a file would give them back
        predictors=tuple(predictors) if trigger is not None else (),
        trigger=trigger,
        forms=read if any(read) else (),
    )


def with_costs(plan: Plan, flops_of_row: dict[tuple[int, ...], int], anchor_bytes: int) -> Plan:
    """The plan with its expected cost: FLOPs of a call by row, and the bytes of one anchor of all sites."""
    full = flops_of_row[(1,) * len(plan.sites)]
    if plan.trigger:  # what it saves is known only after a run
        flops_of_row = dict.fromkeys(plan.schedule, full)
    forecasts = not all(is_full(row) for row in plan.schedule)
    return replace(
        plan,
        flops=sum(flops_of_row[row] for row in plan.schedule),
        flops_uncached=full * plan.steps,
        cache_bytes=anchor_bytes * plan.anchors if forecasts else 0,
    )


def describe(measured: dict[str, Any]) -> str:
    """One sentence on what the solver measured on the prompts that it held back."""
    text = (
        f"on {measured['prompts']} held-back prompts PSNR {measured['psnr_mean']:.1f} dB mean, "
        f"{measured['psnr_worst']:.1f} dB worst"
    )
    if "fewer_steps_psnr" in measured:
        text += f"; {measured['fewer_steps']} plain steps instead: {measured['fewer_steps_psnr']:.1f} dB"
    return text


def _read_values(plan: Plan) -> None:
    """Replaces forms, triggers and predictors that were given as a file holds them by the values they stand for."""
    try:
        trigger = None if plan.trigger in (None, {}) else Trigger.from_json(plan.trigger)
        predictors = plan.predictors
        if isinstance(predictors, (list, tuple)):
            predictors = tuple(Predictor.from_json(data) for data in predictors)
    except PolicyError as error:
        raise PlanError(f"plan field 'trigger' or 'predictors': {error}") from error
    forms = _forms_of(plan.forms) if isinstance(plan.forms, (list, tuple)) else plan.forms
    for name, value in (("trigger", trigger), ("predictors", predictors), ("forms", forms)):
        object.__setattr__(plan, name, value)


def _forms_of(forms: Sequence[Any]) -> tuple[Form | None, ...]:
    try:
        return tuple(Form.from_json(json.loads(json.dumps(f)) if isinstance(f, dict) else f) for f in forms)
    except PlanError as error:
        raise PlanError(f"plan field 'forms' {error}") from error


def _check(plan: Plan) -> None:
    def require(condition: bool, field_name: str, problem: str) -> None:
        if not condition:
            raise PlanError(f"plan field {field_name!r} {problem}")

    for name in ("model", "scheduler", "policy"):
        require(isinstance(getattr(plan, name), str), name, "must be a string")
    for name in ("levels", "sites", "schedule", "coefficients"):
        require(isinstance(getattr(plan, name), tuple), name, "must be a list")
    for name in ("parameters", "measured"):
        require(isinstance(getattr(plan, name), dict), name, "must be an object")
    require(bool(plan.levels) and all(finite(v) for v in plan.levels), "levels", "must be finite numbers, at least one")
    require(bool(plan.sites) and all(isinstance(s, str) for s in plan.sites), "sites", "must be names, at least one")
    wanted = ["prompts", "psnr_mean", "psnr_worst"] + ["fewer_steps"] * ("fewer_steps_psnr" in plan.measured)
    require(
        not plan.measured
        or (
            all(finite(plan.measured.get(name)) for name in wanted)
            and all(
                finite(value) or (name == "forecast" and isinstance(value, str))
                for name, value in plan.measured.items()
            )
        ),
        "measured",
        f"must be empty or hold finite numbers, those of {', '.join(wanted)} at least, and the text of 'forecast'",
    )
    require(
        isinstance(plan.limits, tuple) and len(plan.limits) in (0, len(plan.levels)) and all(map(finite, plan.limits)),
        "limits",
        "must be empty or hold a finite number a level",
    )
    for name in ("flops", "flops_uncached", "cache_bytes"):
        value = getattr(plan, name)
        good = isinstance(value, int) and finite(value) and value >= 0
        require(good, name, "must be a non-negative whole number")
    _check_table(plan, require)


def _check_table(plan: Plan, require: Callable[[bool, str, str], None]) -> None:
    """Checks the parts of a plan whose size depends on its steps and sites."""
    steps, width = len(plan.levels), len(plan.sites)
    for name in ("schedule", "coefficients"):
        table = getattr(plan, name)
        require(
            len(table) == steps and all(isinstance(row, tuple) and len(row) == width for row in table),
            name,
            f"must have {steps} rows (one per level) of {width} (one per site)",
        )
    for name in ("predictors", "forms"):
        value = getattr(plan, name)
        require(
            isinstance(value, tuple) and len(value) in (0, width),
            name,
            f"must be empty or hold {width} objects, one per site",
        )
    require(bool(plan.predictors) == bool(plan.trigger), "predictors", "must be there with a trigger, and only then")
    decided = len(plan.trigger.sample_row(width)) if plan.trigger else width
    require(decided == width, "trigger", f"decides for {decided} sites; the plan has {width}")
    for form in plan.forms:
        require(
            not (form and plan.trigger), "forms", f"may have {form.kind!r} in a static schedule only" if form else ""
        )
    uniform = [not isinstance(plan.form(k), TokensForm) for k in range(width)]
    allowed = [(0, 1) if plain else (0, 1, 2) for plain in uniform]
    good = all(whole(v) and v in allowed[k] for row in plan.schedule for k, v in enumerate(row))
    require(good, "schedule", "must hold 0 and 1 only, and 2 where the site's form has 'tokens'")
    computed = [0] * width
    for step, row in enumerate(plan.schedule):
        for k, full in enumerate(row):
            values = plan.coefficients[step][k]
            where = f"at step {step}, site {plan.sites[k]!r}"
            require(
                isinstance(values, tuple) and all(finite(v) for v in values),
                "coefficients",
                f"{where} must be finite numbers",
            )
            if full == Decision.COMPUTE or plan.trigger:
                require(not values, "coefficients", f"{where} must be empty, because the step computes")
                computed[k] += 1
            else:
                parts = plan.parts(k)
                each = f" for each of {parts} parts" if parts > 1 else ""
                require(
                    len(values) % parts == 0 and 0 < len(values) // parts <= computed[k],
                    "coefficients",
                    f"{where} must be 1 to {computed[k]} numbers, one an anchor{each}",
                )
