"""Triggers: what decides at run time whether a step computes. Pure host code: numbers in, decisions out.

The graph reports numbers (`Measure`); a trigger turns them into decisions, one per sample of a batch. Measures taken
"before" are read before a step's decision, from a prefix of the graph; those taken "after" are read with the next
step's, so that no step reads the device more than once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from dcc.decisions import Decision
from dcc.errors import PolicyError
from dcc.plans.fields import read_fields
from dcc.plans.kinds import kinds_of

BEFORE, AFTER = "before", "after"
REFERENCES = ("previous", "anchor", "older", "forecast", "zero")
TINY = 1e-12
NORMS = ("rel_l1", "l1", "mse", "rel_l2")


@dataclass(frozen=True)
class Measure:
    """A number per sample: how far a site's value is from a reference.

    `against`: the value of the step before ("previous"), of the newest or second newest computed step ("anchor",
    "older"), what this step's forecast of the site would have been ("forecast", after only), or "zero". `norm` is taken
    of the difference d to the reference r, with means over all but the batch: rel_l1 is mean|d| / mean|r|, l1 mean|d|,
    mse mean d^2, rel_l2 |d| / |r|. `when`: "before" at every step, or "after" the steps that compute the site.
    `residual` measures what the site's blocks add, else the value itself is measured.
    """

    site: str
    against: str
    norm: str = "rel_l1"
    when: str = BEFORE
    residual: bool = True

    def __post_init__(self) -> None:
        for name, good in (("against", REFERENCES), ("norm", NORMS), ("when", (BEFORE, AFTER))):
            if getattr(self, name) not in good:
                raise PolicyError(f"a measure's {name}={getattr(self, name)!r}; there are: {', '.join(good)}")

    @property
    def name(self) -> str:
        """The measure's name, unique within a trigger."""
        return f"{self.site} {self.against} {self.norm} {self.when}{'' if self.residual else ' value'}"


Values = Mapping[str, float]  # by Measure.name


@dataclass
class Memory:
    """What a trigger remembers of one sample of one stream."""

    steps: int
    last: int = -1  # newest step that computed
    skipped: int = 0  # steps forecast since then
    total_skipped: int = 0
    total: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)


Decided = bool | tuple[int, ...]  # compute everything or forecast everything, or a row: a Decision for each site
IDLE = Decision.IDLE


@dataclass(frozen=True)
class Trigger:
    """A decision rule. Fields are its parameters, plain JSON values; a plan file holds them."""

    kind: ClassVar[str]

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What the graph must report."""
        raise NotImplementedError

    def decide(self, memory: Memory, step: int, values: Values) -> Decided:
        """Whether `step` computes, given the measures taken "before" it. Changes nothing."""
        raise NotImplementedError

    def observe(self, memory: Memory, step: int, computed: bool, values: Values) -> None:
        """Takes note of a step that is over, with all measures of it. Called once per step, in order."""
        self.learn(memory, step, computed, values)
        memory.last, memory.skipped = (step, 0) if computed else (memory.last, memory.skipped + 1)
        memory.total_skipped += not computed

    def learn(self, memory: Memory, step: int, computed: bool, values: Values) -> None:
        """Remembers what this trigger needs of the step; `memory.last` and `.skipped` are still those before it."""

    def weights(self, memory: Memory, step: int, values: Values) -> list[float] | None:
        """Coefficients of the forecast, newest anchor first, where the trigger decides them too; else None."""
        return None

    def sample_row(self, sites: int) -> tuple[int, ...]:
        """A row that this trigger may ask for, other than the one that computes everything.

        One that decides for each of its own sites gives a row of them; a plan of other sites does not fit it.
        """
        return (int(Decision.FORECAST),) * sites

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"kind": self.kind, **asdict(self)}

    @staticmethod
    def from_json(data: Any) -> Trigger:
        """The trigger that `as_json` wrote. Raises PolicyError for anything else."""
        if isinstance(data, Trigger):
            return data
        kinds = kinds_of(Trigger)
        kind = data.get("kind") if isinstance(data, Mapping) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise PolicyError(f"unknown trigger {data!r:.80}; there are: {', '.join(kinds)}")
        given = {name: value for name, value in data.items() if name != "kind"}
        found = kinds[kind](**read_fields(kinds[kind], given, PolicyError, f"trigger {kind!r}"))
        _ = found.measures  # which refuse what they do not know
        return found


@dataclass(frozen=True)
class Accumulate(Trigger):
    """Forecasts while the sum of scored changes from step to step stays below the threshold; computing clears it.

    The score is a polynomial (highest power first) of the relative L1 change of the value of `site`, floored at 0.
    """

    site: str
    threshold: float
    polynomial: tuple[float, ...] = (1.0, 0.0)
    max_skip: int | None = None

    kind: ClassVar[str] = "accumulate"

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (Measure(self.site, "previous", residual=False),)

    def score(self, values: Values) -> float:
        change = values.get(self.measures[0].name, 0.0)
        total = 0.0
        for factor in self.polynomial:
            total = total * change + factor
        return max(total, 0.0)  # fitted polynomials turn negative outside their range

    def decide(self, memory: Memory, step: int, values: Values) -> bool:
        if self.max_skip is not None and memory.skipped >= self.max_skip:
            return True
        return not memory.total + self.score(values) < self.threshold

    def learn(self, memory: Memory, step: int, computed: bool, values: Values) -> None:
        memory.total = 0.0 if computed else memory.total + self.score(values)


@dataclass(frozen=True)
class Anchored(Trigger):
    """Forecasts while what `site`'s blocks add stays within the threshold (relative L1) of the last computed step."""

    site: str
    threshold: float
    max_skip: int | None = None  # the most forecast steps one after another
    max_skips: int | None = None  # the most forecast steps per run

    kind: ClassVar[str] = "anchored"

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (Measure(self.site, "anchor"),)

    def decide(self, memory: Memory, step: int, values: Values) -> bool:
        if self.max_skip is not None and memory.skipped >= self.max_skip:
            return True
        if self.max_skips is not None and memory.total_skipped >= self.max_skips:
            return True
        return not values[self.measures[0].name] < self.threshold


@dataclass(frozen=True)
class AlignedProbe(Trigger):
    """DiCache: accumulates the change of a shallow probe, and weighs two anchors by how far the probe has moved.

    With P1, P2 the probe at the newest and second newest anchor: g = |p - P2| / |P1 - P2|, clipped to [1, limit]; the
    forecast is A2 + g (A1 - A2). Before a second anchor exists, a copy.
    """

    site: str
    threshold: float
    limit: float = 1.5

    kind: ClassVar[str] = "aligned_probe"

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (
            Measure(self.site, "previous", residual=False),
            Measure(self.site, "anchor", "l1"),
            Measure(self.site, "older", "l1"),
        )

    def decide(self, memory: Memory, step: int, values: Values) -> bool:
        return not memory.total + values[self.measures[0].name] < self.threshold

    def learn(self, memory: Memory, step: int, computed: bool, values: Values) -> None:
        memory.total = 0.0 if computed else memory.total + values.get(self.measures[0].name, 0.0)
        if computed and memory.last >= 0:
            memory.numbers["between"] = values.get(self.measures[1].name, 0.0)  # this anchor to the one before

    def weights(self, memory: Memory, step: int, values: Values) -> list[float] | None:
        between = memory.numbers.get("between", 0.0)
        if not between:
            return [1.0]
        gain = min(max(values[self.measures[2].name] / between, 1.0), self.limit)
        return [gain, 1.0 - gain]


@dataclass(frozen=True)
class TransformRate(Trigger):
    """EasyCache: predicts the output's change from the latent's, by the ratio of the two over the last computed steps.

    Adds k mean|x - x_before| / mean|v| per step, with k = mean|v_a - v_b| / mean|x_a - x_b| of the last two computed
    steps and v the newest computed output; computes while k is not known.
    """

    threshold: float
    latent: str = "latent"
    output: str = "output"

    kind: ClassVar[str] = "transform_rate"

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (
            Measure(self.latent, "previous", "l1"),
            Measure(self.latent, "anchor", "l1"),
            Measure(self.output, "anchor", "l1", when=AFTER, residual=False),
            Measure(self.output, "zero", "l1", when=AFTER, residual=False),
        )

    def _score(self, memory: Memory, values: Values) -> float:
        return memory.numbers["rate"] * values.get(self.measures[0].name, 0.0) / max(memory.numbers["size"], TINY)

    def decide(self, memory: Memory, step: int, values: Values) -> bool:
        return "rate" not in memory.numbers or not memory.total + self._score(memory, values) < self.threshold

    def learn(self, memory: Memory, step: int, computed: bool, values: Values) -> None:
        if not computed:
            memory.total += self._score(memory, values)
            return
        memory.total = 0.0
        moved, changed, size = (values.get(measure.name) for measure in self.measures[1:])
        if moved is not None and changed is not None and size is not None:
            memory.numbers |= {"rate": changed / max(moved, TINY), "size": size}


@dataclass(frozen=True)
class Codebook(Trigger):
    """Decides at a computed step how many steps later the next one is: AdaCache, BWCache.

    The mean relative L1 change of `sites` since the computed step before, divided by the steps between where `rate` is
    set, is looked up: `gaps[i]` for the first `bounds[i]` that it is below, and 1 beyond the last. With `late`, the
    last half of the steps that were left at the first gap above 1 all compute.
    """

    sites: tuple[str, ...]
    bounds: tuple[float, ...]
    gaps: tuple[int, ...]
    rate: bool = True
    residual: bool = True
    late: bool = False

    kind: ClassVar[str] = "codebook"

    def __post_init__(self) -> None:
        _same_length(self, "bounds", "gaps")

    @property
    def measures(self) -> tuple[Measure, ...]:
        return tuple(Measure(site, "anchor", when=AFTER, residual=self.residual) for site in self.sites)

    def decide(self, memory: Memory, step: int, values: Values) -> bool:
        if step >= memory.numbers.get("late", memory.steps):
            return True
        return step - memory.last >= memory.numbers.get("gap", 1)

    def learn(self, memory: Memory, step: int, computed: bool, values: Values) -> None:
        found = [values[m.name] for m in self.measures if m.name in values]
        if not computed or not found:
            return
        change = sum(found) / len(found) / (step - memory.last if self.rate else 1)
        gap = next((gap for bound, gap in zip(self.bounds, self.gaps, strict=True) if change < bound), 1)
        memory.numbers["gap"] = gap
        if self.late and gap > 1 and "late" not in memory.numbers:
            memory.numbers["late"] = memory.steps - (memory.steps - step) // 2


@dataclass(frozen=True)
class Verify(Trigger):
    """SpeCa: forecasts speculatively; the truth of one site, computed on the drafted values, judges each forecast.

    A forecast whose error (relative L1) exceeds max(base * decay**progress, floor), progress from 0 to 1 over the run,
    makes the next step compute. At least `min_skip` forecasts follow a computed step, at most `max_skip`.
    """

    site: str
    base: float
    decay: float
    floor: float
    min_skip: int = 2
    max_skip: int = 8

    kind: ClassVar[str] = "verify"

    def __post_init__(self) -> None:
        if self.decay < 0:
            raise PolicyError(
                f"trigger {self.kind!r}: field 'decay' is {self.decay}; a root of it is taken, give 0 or more"
            )

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (Measure(self.site, "forecast", when=AFTER),)

    def decide(self, memory: Memory, step: int, values: Values) -> bool:
        if memory.skipped >= self.max_skip:
            return True
        return memory.skipped >= self.min_skip and memory.numbers.get("error", 0.0) > memory.numbers.get("limit", 0.0)

    def learn(self, memory: Memory, step: int, computed: bool, values: Values) -> None:
        progress = step / max(memory.steps - 1, 1)
        memory.numbers["error"] = 0.0 if computed else values.get(self.measures[0].name, 0.0)
        memory.numbers["limit"] = max(self.base * self.decay**progress, self.floor)


@dataclass(frozen=True)
class Layerwise(Trigger):
    """Decides at a computed step which of `sites`, each cached on its own, the steps up to the next may forecast.

    Compares each site with its value at the computed step before. Its limit is `threshold`, or, where `gamma` is set,
    gamma times the site's own change at the last of the first `warmup` steps. Every `period`-th step computes all.
    With `prefix`, the sites are values after blocks, and only the last one within its limit is forecast: what comes
    before it is not needed, what comes after it is computed.
    """

    sites: tuple[str, ...]
    period: int
    threshold: float = 0.0
    gamma: float = 0.0
    warmup: int = 0
    norm: str = "rel_l1"
    prefix: bool = False

    kind: ClassVar[str] = "layerwise"

    @property
    def measures(self) -> tuple[Measure, ...]:
        return tuple(Measure(site, "anchor", self.norm, AFTER, residual=not self.prefix) for site in self.sites)

    def decide(self, memory: Memory, step: int, values: Values) -> Decided:
        within = [bool(memory.numbers.get(f"within {index}", 0.0)) for index in range(len(self.sites))]
        if step - memory.last >= self.period or not any(within):
            return True
        if not self.prefix:
            return tuple(int(not ok) for ok in within)
        return self._after(max(index for index, ok in enumerate(within) if ok))

    def sample_row(self, sites: int) -> tuple[int, ...]:
        return self._after(len(self.sites) - 1) if self.prefix else (0,) * len(self.sites)

    def _after(self, last: int) -> tuple[int, ...]:
        return tuple(IDLE if index < last else int(index > last) for index in range(len(self.sites)))

    def learn(self, memory: Memory, step: int, computed: bool, values: Values) -> None:
        if not computed:
            return
        for index, measure in enumerate(self.measures):
            change = values.get(measure.name)
            if change is None:
                continue
            if self.gamma and step < self.warmup:
                memory.numbers[f"limit {index}"] = self.gamma * change
            limit = memory.numbers.get(f"limit {index}", 0.0) if self.gamma else self.threshold
            memory.numbers[f"within {index}"] = float(0.0 < limit and change <= limit)


@dataclass(frozen=True)
class Coarsest(Trigger):
    """MixCache: at a computed step picks the coarsest of several cached sites whose change per step is below its bound.

    `sites` run from the coarsest (most work saved) to the finest; each is forecast alone, for `gap` - 1 steps.
    """

    sites: tuple[str, ...]
    bounds: tuple[float, ...]
    gap: int = 2

    kind: ClassVar[str] = "coarsest"

    def __post_init__(self) -> None:
        _same_length(self, "sites", "bounds")

    @property
    def measures(self) -> tuple[Measure, ...]:
        return tuple(Measure(site, "anchor", when=AFTER) for site in self.sites)

    def decide(self, memory: Memory, step: int, values: Values) -> Decided:
        chosen = int(memory.numbers.get("chosen", IDLE))
        if chosen == IDLE or step - memory.last >= self.gap:
            return True
        return tuple(0 if index == chosen else IDLE for index in range(len(self.sites)))

    def sample_row(self, sites: int) -> tuple[int, ...]:
        return (0,) + (IDLE,) * (len(self.sites) - 1)

    def learn(self, memory: Memory, step: int, computed: bool, values: Values) -> None:
        found = [values.get(measure.name) for measure in self.measures]
        if not computed or None in found:
            return
        per_step = [change / (step - memory.last) for change in found if change is not None]
        fitting = [i for i, (c, bound) in enumerate(zip(per_step, self.bounds, strict=True)) if c < bound]
        memory.numbers["chosen"] = float(fitting[0] if fitting else IDLE)


def _same_length(trigger: Trigger, first: str, second: str) -> None:
    sizes = [len(getattr(trigger, name)) for name in (first, second)]
    if sizes[0] != sizes[1]:
        raise PolicyError(f"trigger {trigger.kind!r}: {first!r} has {sizes[0]} entries and {second!r} {sizes[1]}")
