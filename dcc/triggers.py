"""Triggers: what decides at run time whether a step computes. Pure host code: numbers in, decisions out.

The graph reports numbers (`Measure`); a trigger turns them into decisions, one per sample of a batch. Measures taken
"before" are read before a step's decision, from a prefix of the graph; those taken "after" are read with the next
step's, so that no step reads the device more than once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from dcc.errors import PolicyError

BEFORE, AFTER = "before", "after"
REFERENCES = ("previous", "anchor", "older", "forecast", "zero")
NORMS = ("rel_l1", "l1", "mse", "rel_l2")


@dataclass(frozen=True)
class Measure:
    """A number per sample: how far a site's value is from a reference.

    `against`: the value of the step before ("previous"), of the newest or second newest computed step ("anchor",
    "older"), what this step's forecast of the site would have been ("forecast", after only), or "zero". `norm` of the
    difference d to the reference r, means over all but the batch: rel_l1 mean|d| / mean|r|, l1 mean|d|, mse mean d^2,
    rel_l2 |d| / |r|. `when`: "before" at every step, or "after" the steps that compute the site. `residual` measures
    what the site's blocks add, else the value itself.
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
        """Unique within a trigger."""
        return f"{self.site} {self.against} {self.norm} {self.when}{'' if self.residual else ' value'}"


Values = Mapping[str, float]  # by Measure.name


@dataclass
class Memory:
    """What a trigger remembers of one sample of one stream."""

    steps: int
    last: int = -1  # newest step that computed
    skipped: int = 0  # steps forecast since then
    total: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trigger:
    """A decision rule. Fields are its parameters, plain JSON values; a plan file holds them."""

    kind: ClassVar[str]

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What the graph must report."""
        raise NotImplementedError

    def decide(self, memory: Memory, step: int, values: Values) -> bool:
        """Whether `step` computes, given the measures of "before". Changes nothing."""
        raise NotImplementedError

    def observe(self, memory: Memory, step: int, computed: bool, values: Values) -> None:
        """Takes note of a step that is over, with all measures of it. Called once a step, in order."""
        raise NotImplementedError

    def as_json(self) -> dict[str, Any]:
        """What `trigger_of` reads."""
        return {"kind": self.kind, **asdict(self)}


def trigger_of(data: Mapping[str, Any]) -> Trigger:
    """The trigger that `as_json` wrote. Raises PolicyError for anything else."""
    kinds = {kind.kind: kind for kind in Trigger.__subclasses__()}
    if not isinstance(data, Mapping) or data.get("kind") not in kinds:
        raise PolicyError(f"unknown trigger {data!r:.80}; there are: {', '.join(kinds)}")
    cls = kinds[data["kind"]]
    known = {f.name for f in fields(cls)}
    unknown = [name for name in data if name not in known | {"kind"}]
    if unknown:
        raise PolicyError(f"trigger {cls.kind!r} has no field {', '.join(unknown)}; it has: {', '.join(sorted(known))}")
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in data.items() if name != "kind"})
