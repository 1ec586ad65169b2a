"""Forms: how a plan says that a site is forecast other than by one combination of whole anchors.

In a file a form is {} for none, or an object of one key, its kind, whose value is an object of its fields:
- {"bands": {"transform": "dct" or "fft", "cutoff": 0.1, "grid": [rows, columns] or null, "predictors": [low, high]}}
- {"clusters": {"of_channel": [0, 2, 0, ...], "predictors": [one per cluster]}}
- {"tokens": {"select": ..., "ratio": ..., ...}}: a share of the tokens is computed afresh (variants/refresh.py)
- {"corrector": {"kind": ..., ...}}: the site is kept relative to a cheap linear map (variants/correctors.py)
Each of the `predictors` makes one row of coefficients, and a plan keeps a site's rows one after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dcc.errors import PlanError, PolicyError
from dcc.kernels.band_split import TRANSFORMS
from dcc.plans.fields import finite, whole
from dcc.plans.kinds import kinds_of
from dcc.plans.predictors import Predictor


@dataclass(frozen=True)
class Form:
    """A way to forecast. Subclasses have a `kind` and the fields of its object."""

    kind: ClassVar[str]

    @property
    def predictors(self) -> tuple[Predictor, ...]:
        """The predictor of each row of coefficients; none where the site's own predictor makes the only row."""
        return ()

    @property
    def rows(self) -> int:
        """How many rows of coefficients it takes."""
        return len(self.predictors) or 1

    def fields(self) -> dict[str, Any]:
        """The form's object in a file."""
        raise NotImplementedError

    @classmethod
    def of(cls, fields: Any) -> Form:
        """The form of this object. Raises PlanError, naming what is wrong."""
        raise NotImplementedError

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {self.kind: self.fields()}

    @staticmethod
    def from_json(data: Any) -> Form | None:
        """The form that `as_json` wrote, None for {}. Raises PlanError for anything else."""
        if isinstance(data, Form) or data is None:
            return data
        if not isinstance(data, Mapping) or (data and (len(data) != 1 or next(iter(data)) not in kinds_of(Form))):
            got = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise PlanError(f"must be empty or have one of the keys {', '.join(kinds_of(Form))}; got {got}")
        for kind, fields in data.items():
            return kinds_of(Form)[kind].of(fields)
        return None

    def __str__(self) -> str:
        return f"{self.kind}: {', '.join(f'{name}={value}' for name, value in self.fields().items())}"


@dataclass(frozen=True)
class TokensForm(Form):
    """A share of a site's tokens is computed afresh at some steps, for which a schedule holds Decision.REFRESH.

    `select` says how they are chosen; `ratio` is the share of the site's tokens, one number or one per site of the
    group (None where `select` needs none); `options` are the numbers of that way to choose, by name (SELECTORS).
    """

    kind: ClassVar[str] = "tokens"
    select: str
    ratio: float | tuple[float, ...] | None = None
    options: tuple[tuple[str, float], ...] = ()
    order: tuple[str, ...] = ()  # the order in which the fields were given

    def fields(self) -> dict[str, Any]:
        ratio = list(self.ratio) if isinstance(self.ratio, tuple) else self.ratio
        known = {"select": self.select, "ratio": ratio, **dict(self.options)}
        return {name: known[name] for name in self.order or [n for n in known if n != "ratio" or ratio is not None]}

    @property
    def ratios(self) -> tuple[float, ...]:
        """The shares, one or one per site; 1 where `select` needs none."""
        return self.ratio if isinstance(self.ratio, tuple) else (1.0 if self.ratio is None else self.ratio,)

    @classmethod
    def of(cls, fields: Any) -> TokensForm:
        if not isinstance(fields, Mapping) or fields.get("select") not in list(SELECTORS):
            raise PlanError(f"'tokens' must be an object whose 'select' is one of {', '.join(SELECTORS)}")
        select = fields["select"]
        wanted = {"select", *SELECTORS[select], *(() if select in NO_RATIO else ("ratio",))}
        if set(fields) != wanted:
            raise PlanError(
                f"'tokens' with select={select!r} must have {', '.join(sorted(wanted))}; it has {sorted(fields)}"
            )
        numbers = [v for name in wanted - {"select"} for v in _listed(fields[name])]
        if any(isinstance(fields[name], (list, tuple)) for name in wanted - {"ratio"}) or not all(map(finite, numbers)):
            raise PlanError("'tokens' must hold finite numbers besides 'select'")
        if not whole(fields.get("clusters", 1), 1):
            raise PlanError("'tokens' must have a whole number of 1 or more as its 'clusters'")
        ratio = fields.get("ratio")
        ratio = tuple(ratio) if isinstance(ratio, (list, tuple)) else ratio
        if ratio == () or not all(0 < share <= 1 for share in _listed(1.0 if ratio is None else ratio)):
            raise PlanError("'tokens' must have a ratio in (0, 1], or a list of them, one per site")
        options = tuple((name, fields[name]) for name in SELECTORS[select])
        return cls(select, ratio, options, tuple(fields))


SELECTORS = {  # how tokens are chosen, and the numbers of each way
    "norm": ("sign", "age"),  # +1 for large norms first, -1 for small ones; what a step of waiting adds to the score
    "random": (),
    "cluster": ("clusters", "share"),  # K; how far the other tokens of a cluster follow its fresh one
    "noise": ("starvation", "sign"),  # weight of a drop in the exponent; +1 for large deviations first, -1 for small
}
NO_RATIO = ("cluster",)  # one token per cluster


@dataclass(frozen=True)
class CorrectorForm(Form):
    """A site is kept relative to a cheap linear map of a live value (variants/correctors.py).

    With `map` "low_rank" it is the layer's own weight at `rank`, its channels weighed by the safetensors file
    `channels` if one is named; with `map` "linear" it is made of the tensors of the file `weights`.
    """

    kind: ClassVar[str] = "corrector"
    map: str
    rank: int = 0
    channels: str | None = None
    weights: str = ""

    def fields(self) -> dict[str, Any]:
        own = {"kind": self.map, "rank": self.rank, "channels": self.channels, "weights": self.weights}
        return {name: own[name] for name in CORRECTORS[self.map]}

    @classmethod
    def of(cls, fields: Any) -> CorrectorForm:
        if not isinstance(fields, Mapping) or fields.get("kind") not in list(CORRECTORS):
            raise PlanError(f"'corrector' must be an object whose 'kind' is one of {', '.join(CORRECTORS)}")
        kind, wanted = fields["kind"], CORRECTORS[fields["kind"]]
        if set(fields) != set(wanted):
            raise PlanError(
                f"'corrector' of kind {kind!r} must have {', '.join(wanted)}; it has {', '.join(sorted(fields))}"
            )
        if kind == "linear":
            if not isinstance(fields["weights"], str):
                raise PlanError("'corrector' must have a path as its 'weights'")
            return cls(kind, weights=fields["weights"])
        if not whole(fields["rank"], 1):
            raise PlanError("'corrector' must have a whole number of 1 or more as its 'rank'")
        if not (fields["channels"] is None or isinstance(fields["channels"], str)):
            raise PlanError("'corrector' must have a path as 'channels'")
        return cls(kind, fields["rank"], fields["channels"])


CORRECTORS = {"low_rank": ("kind", "rank", "channels"), "linear": ("kind", "weights")}


@dataclass(frozen=True)
class BandsForm(Form):
    """Low frequencies from one combination, high ones from another; `parts` are the predictors of the two.

    `cutoff` is a share of the highest frequency, `grid` the rows and columns of tokens, None for pixels or a line.
    """

    kind: ClassVar[str] = "bands"
    transform: str
    cutoff: float
    grid: tuple[int, int] | None
    parts: tuple[Predictor, ...]

    @property
    def predictors(self) -> tuple[Predictor, ...]:
        return self.parts

    def fields(self) -> dict[str, Any]:
        grid = list(self.grid) if self.grid else None
        return {"transform": self.transform, "cutoff": self.cutoff, "grid": grid, "predictors": _written(self.parts)}

    @classmethod
    def of(cls, fields: Any) -> BandsForm:
        _check_names(cls.kind, fields, ("transform", "cutoff", "grid", "predictors"))
        grid, cutoff = fields["grid"], fields["cutoff"]
        if fields["transform"] not in TRANSFORMS:
            raise PlanError(f"'bands' must have a transform of {', '.join(TRANSFORMS)}")
        if not finite(cutoff) or not 0 <= cutoff <= 1:
            raise PlanError("'bands' must have a cutoff from 0 to 1")
        if grid is not None and not (
            isinstance(grid, (list, tuple)) and len(grid) == 2 and all(whole(n, 1) for n in grid)
        ):
            raise PlanError("'bands' must have a grid of two whole numbers, or null")
        if not isinstance(fields["predictors"], (list, tuple)) or len(fields["predictors"]) != 2:
            raise PlanError("'bands' must have two predictors, low and high")
        parts = _read(cls.kind, fields["predictors"])
        return cls(fields["transform"], cutoff, (grid[0], grid[1]) if grid else None, parts)

    def __str__(self) -> str:
        over = f" over {self.grid[0]}x{self.grid[1]} tokens" if self.grid else ""
        low, high = self.parts
        return f"bands by {self.transform}{over}, cutoff {self.cutoff:g}: low {low}, high {high}"


@dataclass(frozen=True)
class ClustersForm(Form):
    """One row of coefficients per cluster of channels: `of_channel` is a channel's cluster, `parts` the predictors."""

    kind: ClassVar[str] = "clusters"
    of_channel: tuple[int, ...]
    parts: tuple[Predictor, ...]

    @property
    def predictors(self) -> tuple[Predictor, ...]:
        return self.parts

    def fields(self) -> dict[str, Any]:
        return {"of_channel": list(self.of_channel), "predictors": _written(self.parts)}

    @classmethod
    def of(cls, fields: Any) -> ClustersForm:
        _check_names(cls.kind, fields, ("of_channel", "predictors"))
        labels, predictors = fields["of_channel"], fields["predictors"]
        if not isinstance(predictors, (list, tuple)) or not predictors:
            raise PlanError("'clusters' must have a list of predictors, one per cluster")
        good = isinstance(labels, (list, tuple)) and labels and all(map(whole, labels))
        if not good or set(labels) != set(range(len(predictors))):
            raise PlanError(
                f"'clusters' must name one of the {len(predictors)} clusters for each channel, and each cluster at "
                "least once"
            )
        return cls(tuple(labels), _read(cls.kind, predictors))

    def __str__(self) -> str:
        sizes = [self.of_channel.count(cluster) for cluster in range(len(self.parts))]
        return "clusters of channels: " + ", ".join(f"{n} {part}" for n, part in zip(sizes, self.parts, strict=True))


def flat(form: Form | None, own: Any, step: int, anchors: Sequence[int]) -> tuple[float, ...]:
    """Coefficients of all rows of a site at a step, one row after another, each filled up to the longest with zeros.

    `own` is the site's own predictor, used where its form brings none.
    """
    predictors = (form.predictors if form else ()) or (own,)
    rows = [list(predictor.coefficients(step, anchors)) for predictor in predictors]
    length = max(map(len, rows))
    return tuple(value for row in rows for value in [*row, *[0.0] * (length - len(row))])


def split(values: Sequence[float], rows: int) -> list[tuple[float, ...]]:
    """The rows that `flat` joined."""
    length = len(values) // rows
    return [tuple(values[row * length : (row + 1) * length]) for row in range(rows)]


def _check_names(kind: str, fields: Any, wanted: Sequence[str]) -> None:
    if not isinstance(fields, Mapping) or set(fields) != set(wanted):
        raise PlanError(f"{kind!r} must be an object of {', '.join(wanted)}")


def _written(parts: Sequence[Predictor]) -> list[dict[str, Any]]:
    return [part.as_json() for part in parts]


def _read(kind: str, data: Sequence[Any]) -> tuple[Predictor, ...]:
    try:
        return tuple(Predictor.from_json(part) for part in data)
    except PolicyError as error:
        raise PlanError(f"{kind!r}: {error}") from error


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
