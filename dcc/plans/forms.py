"""How a plan says that a site is forecast other than by one combination of whole anchors: `Plan.forms`.

A form is {} or an object of one key:
- {"bands": {"transform": "dct" or "fft", "cutoff": 0.1, "grid": [rows, columns] or null, "predictors": [low, high]}}
- {"clusters": {"of_channel": [0, 2, 0, ...], "predictors": [one a cluster]}}
- {"tokens": ...}, see refresh.py.
- {"corrector": ...}, see correctors.py.
`predictors` are Predictor.as_json(); each has a row of coefficients, and a plan keeps a site's rows one behind another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from dcc.errors import PlanError, PolicyError
from dcc.kernels.band_split import TRANSFORMS, fitted
from dcc.kernels.combine import channel_dim
from dcc.passes.base import Form, Site
from dcc.passes.forms import Bands, Clusters
from dcc.plans.predictors import Predictor
from dcc.variants.correctors import corrector_problem
from dcc.variants.refresh import form_problem as tokens_problem


def rows_of(form: dict[str, Any]) -> int:
    """Rows of coefficients of a form."""
    return len(_spec(form).get("predictors", ())) or 1


def predictors_of(form: dict[str, Any], own: Any) -> list[Any]:
    """What makes each row of coefficients: the form's own predictors, or the one of the site."""
    return [Predictor.of(data) for data in _spec(form).get("predictors", ())] or [own]


def flat(form: dict[str, Any], own: Any, step: int, anchors: Sequence[int]) -> tuple[float, ...]:
    """Coefficients of all rows for a step, one row behind another, each as long as the longest."""
    rows = [list(predictor.coefficients(step, anchors)) for predictor in predictors_of(form, own)]
    length = max(map(len, rows))
    return tuple(value for row in rows for value in [*row, *[0.0] * (length - len(row))])


def split(values: Sequence[float], rows: int) -> list[tuple[float, ...]]:
    """The rows that `flat` joined."""
    length = len(values) // rows
    return [tuple(values[row * length : (row + 1) * length]) for row in range(rows)]


def form_text(form: dict[str, Any]) -> str:
    """One line on a form, empty for none."""
    spec = _spec(form)
    names = [str(Predictor.of(data)) for data in spec.get("predictors", ())]
    if "bands" in form:
        over = f" over {spec['grid'][0]}x{spec['grid'][1]} tokens" if spec["grid"] else ""
        return f"bands by {spec['transform']}{over}, cutoff {spec['cutoff']:g}: low {names[0]}, high {names[1]}"
    if "clusters" in form:
        sizes = [spec["of_channel"].count(cluster) for cluster in range(len(names))]
        return "clusters of channels: " + ", ".join(f"{n} {name}" for n, name in zip(sizes, names, strict=True))
    return "".join(f"{name}: {', '.join(f'{k}={v}' for k, v in spec.items())}" for name in form)


def form_problem(form: dict[str, Any]) -> str | None:
    """What is wrong with a form, None where nothing is."""
    if not form:
        return None
    if len(form) != 1 or next(iter(form)) not in CHECKS:
        return f"must be empty or have one of the keys {', '.join(CHECKS)}; got {sorted(form)}"
    if "tokens" in form:
        return tokens_problem(form)
    if "corrector" in form:
        problem = corrector_problem(form["corrector"])
        return f"'corrector' {problem}" if problem else None
    (name,) = form
    spec = form[name]
    wanted = FIELDS[name]
    if not isinstance(spec, dict) or set(spec) != set(wanted):
        return f"{name!r} must be an object of {', '.join(wanted)}"
    if problem := CHECKS[name](spec):
        return f"{name!r} {problem}"
    try:
        _ = [Predictor.of(data) for data in spec.get("predictors", ())]
    except PolicyError as error:
        return f"{name!r}: {error}"
    return None


def form_of(form: dict[str, Any], sites: Sequence[Site], name: str) -> Form | None:
    """What passes do for a form with these sites, None where they are plain. Raises PlanError where it cannot be."""
    if "bands" in form:
        spec = form["bands"]
        bands = Bands(spec["transform"], float(spec["cutoff"]), tuple(spec["grid"]) if spec["grid"] else None)
        for site in sites:
            shape = max(site.shapes, key=math.prod)
            if len(shape) < 3 or (bands.transform == "fft" and len(shape) != 3):
                raise PlanError(
                    f"{site.name!r} has shape {list(shape)}; bands by {bands.transform!r} need "
                    f"{'[batch, tokens, channels]' if bands.transform == 'fft' else 'tokens or pixels'}"
                )
            if bands.transform == "dct" and len(shape) == 3:
                try:
                    fitted(bands.grid, shape[1])
                except PlanError as error:
                    raise PlanError(f"{site.name!r}: {error}") from error
        return bands
    if "clusters" in form:
        clusters = Clusters(tuple(form["clusters"]["of_channel"]))
        for site in sites:
            for shape in site.shapes:
                if (channels := shape[channel_dim(len(shape))]) != len(clusters.of_channel):
                    raise PlanError(
                        f"{name!r}: clusters of {len(clusters.of_channel)} channels do not fit {site.name!r}, which "
                        f"has a value of {channels}; choose a site of one value"
                    )
        return clusters
    return None


def _bands_problem(spec: dict[str, Any]) -> str | None:
    grid = spec["grid"]
    if spec["transform"] not in TRANSFORMS:
        return f"must have a transform of {', '.join(TRANSFORMS)}"
    if not _number(spec["cutoff"]) or not 0 <= spec["cutoff"] <= 1:
        return "must have a cutoff from 0 to 1"
    if grid is not None and not (isinstance(grid, list) and len(grid) == 2 and all(map(_count, grid))):
        return "must have a grid of two whole numbers, or null"
    if not isinstance(spec["predictors"], list) or len(spec["predictors"]) != 2:
        return "must have two predictors, low and high"
    return None


def _clusters_problem(spec: dict[str, Any]) -> str | None:
    labels, predictors = spec["of_channel"], spec["predictors"]
    if not isinstance(predictors, list) or not predictors:
        return "must have a list of predictors, one a cluster"
    good = isinstance(labels, list) and labels and all(isinstance(v, int) and v >= 0 for v in labels)
    if not good or set(labels) != set(range(len(predictors))):
        return f"must name one of the {len(predictors)} clusters for each channel, and each cluster at least once"
    return None


def _spec(form: dict[str, Any]) -> dict[str, Any]:
    spec = next(iter(form.values()), {})
    return spec if isinstance(spec, dict) else {}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


FIELDS = {
    "bands": ("transform", "cutoff", "grid", "predictors"),
    "clusters": ("of_channel", "predictors"),
}
CHECKS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "tokens": lambda spec: None,
    "corrector": lambda spec: None,
    "bands": _bands_problem,
    "clusters": _clusters_problem,
}
