"""What a policy is: sites, when each is computed, how it is forecast in between, and what decides that.

A published method is one function from a `Setting` and its keyword parameters to a `Policy`, decorated with the facts
that its row of the table shows.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load

from dcc import arguments
from dcc.errors import PolicyError, SettingError, SiteError
from dcc.files import parse_json, read_bytes
from dcc.plans.fields import finite
from dcc.plans.predictors import Predictor, Switched, Table

if TYPE_CHECKING:
    from torch import Tensor

    from dcc.discover.sites import Sites
    from dcc.measure.profile import Profile
    from dcc.plans.triggers import Trigger

DEFAULT_SITE = "auto"  # the residual of all blocks where there is one, else the U-Net cut, else the raw output
REQUIRED = "required"  # in the place of the default of a parameter that has none
COPY = Predictor("copy")


@dataclass(frozen=True)
class Cached:
    """One site or group of sites: 1 in `mask` for every step that computes it; `predictor` forecasts it at the others.

    Under a trigger a 1 is a step that computes whatever the trigger says, and a 0 leaves it to the trigger. `form`, as
    in `Plan.forms`, says how the value is forecast if not by one combination of whole anchors; else it is empty.
    """

    site: str
    mask: tuple[int, ...]
    predictor: Predictor | Switched | Table = COPY
    form: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Policy:
    """What a method decides for one setting. Without a `trigger` it is a static schedule."""

    caches: tuple[Cached, ...]
    trigger: Trigger | None = None


class Setting:
    """What a policy may look at: the run's noise levels, the denoiser's sites, and, measured once when first asked
    for, the profile, raw values of a site and the quality of other policies on the calibration prompts."""

    def __init__(
        self,
        levels: Sequence[float],
        sites: Sites | None = None,
        profile: Callable[[], Profile] | None = None,
        values: Callable[[str], Tensor] | None = None,
        score: Callable[[Policy], float] | None = None,
    ) -> None:
        self.levels = tuple(levels)
        self._sites, self._profile, self._values, self._score = sites, profile, values, score
        self.asked: list[str] = []  # what policies asked to be measured, one entry per time

    @property
    def steps(self) -> int:
        """Number of sampler steps."""
        return len(self.levels)

    @property
    def sites(self) -> Sites:
        """The sites of the captured denoiser."""
        return self._given(self._sites, "the sites of a captured denoiser")

    @property
    def profile(self) -> Profile:
        """The profile of the calibration prompts."""
        self.asked.append("profile")
        return self._measured_profile

    @functools.cached_property
    def _measured_profile(self) -> Profile:
        return self._given(self._profile, "a calibration profile")()

    def values(self, site: str) -> Tensor:
        """True values of a site (its largest port) in one uncached run of the first prompt: [steps, batch, ...]."""
        self.asked.append(f"values of {site}")
        return self._given(self._values, "recorded values")(site)

    def score(self, policy: Policy) -> float:
        """Mean PSNR in dB of the final samples of the calibration prompts under another policy."""
        self.asked.append("score")
        return self._given(self._score, "runs of the calibration prompts")(policy)

    def has(self, site: str) -> bool:
        """Whether the denoiser has a site or a group of this name."""
        try:
            return bool(self.sites.select(site))
        except SiteError:
            return False

    def numbered(self, stop: int | None = None) -> int:
        """How many blocks the denoiser has. Raises PolicyError where it has fewer than `stop`."""
        count = len(self.sites.order)
        if count < (stop or 1):
            raise PolicyError(f"this needs {stop or 1} or more repeated blocks; the denoiser has {count}")
        return count

    @staticmethod
    def _given(value: Any, what: str) -> Any:
        if value is None:
            raise SettingError(f"this policy needs {what}, which is not at hand here; name it in dcc.compile")
        return value


@dataclass(frozen=True)
class Method:
    """A published method: the function that makes its policy, and its row of the table.

    `kind` is its class in the survey (arXiv 2510.19755), `checked` how far the formula was verified: C in the method's
    own code, C3 in another's implementation, D by description only, own for ours. `syncs` counts host synchronisations
    per step. `needs` is what must be measured or given before.
    """

    make: Callable[..., Policy]
    kind: str
    title: str
    source: str
    checked: str
    sites: str
    trigger: str
    predictor: str
    needs: str = "nothing"
    syncs: str = "0"

    @property
    def name(self) -> str:
        """The name that `policy=` takes."""
        return self.make.__name__

    @property
    def parameters(self) -> list[str]:
        """Its keyword parameters."""
        return [p.name for p in inspect.signature(self.make).parameters.values() if p.kind is p.KEYWORD_ONLY]

    @property
    def defaults(self) -> dict[str, str]:
        """Its keyword parameters with their defaults as text; "required" where there is none."""
        signature = inspect.signature(self.make).parameters
        keywords = [p for p in signature.values() if p.kind is p.KEYWORD_ONLY]
        return {p.name: REQUIRED if p.default is p.empty else repr(p.default) for p in keywords}

    def facts(self) -> dict[str, Any]:
        """Its row of the table, as plain values."""
        fields = ("name", "title", "kind", "sites", "trigger", "predictor", "needs", "syncs", "source", "checked")
        return {name: getattr(self, name) for name in fields} | {"parameters": self.defaults}

    def __call__(self, setting: Setting, **parameters: Any) -> Policy:
        """The policy. Raises PolicyError for a parameter of a wrong type or value, SiteError for an unknown site."""
        hints = get_type_hints(self.make)
        for name, value in parameters.items():
            if not arguments.fits(value, hints[name]):
                written = str(self.make.__annotations__[name])
                good = written.replace("Sequence", "list").replace("Mapping", "dict").replace(" |", " or")
                raise PolicyError(f"policy {self.name!r}: {name}={arguments.shown(value)} must be of type {good}")
        return self.make(setting, **parameters)


def method(kind: str, **facts: str) -> Callable[[Callable[..., Policy]], Method]:
    """Makes a function a Method of the survey's class `kind`."""
    return lambda make: Method(make, kind, **facts)


def every(setting: Setting, interval: int, first: int = 1, last: int = 0) -> tuple[int, ...]:
    """The `first` steps, every `interval`-th step after the last of them, and the `last` steps of the run."""
    whole(interval=interval, first=first)
    whole(0, last=last)
    steps = setting.steps
    return tuple(int(s < first or (s - first + 1) % interval == 0 or s >= steps - last) for s in range(steps))


def forced(setting: Setting, first: int = 1, last: int = 1) -> tuple[int, ...]:
    """The steps that compute whatever a trigger says: the `first` and the `last` ones."""
    whole(first=first)
    whole(0, last=last)
    return tuple(int(s < first or s >= setting.steps - last) for s in range(setting.steps))


def listed(setting: Setting, steps: Sequence[int]) -> tuple[int, ...]:
    """A mask that computes the listed steps and the first one."""
    bad = [s for s in steps if not isinstance(s, int) or not 0 <= s < setting.steps]
    if bad:
        raise PolicyError(f"{bad} are no steps of a run of {setting.steps}: give whole numbers from 0 on")
    return tuple(int(s in set(steps) | {0}) for s in range(setting.steps))


def given_mask(setting: Setting, steps_mask: Sequence[int]) -> tuple[int, ...]:
    """A caller's own mask. Raises PolicyError unless it has a 0 or 1 for every step and begins with 1."""
    mask = list(steps_mask) if isinstance(steps_mask, Sequence) else [steps_mask]
    if len(mask) != setting.steps or any(v not in (0, 1) for v in mask):
        raise PolicyError(f"steps_mask must be {setting.steps} numbers 0 or 1, one per step; got {len(mask)}: {mask}")
    if not mask[0]:
        raise PolicyError("steps_mask must begin with 1: there is nothing to forecast the first step from")
    return tuple(int(v) for v in mask)


def masked(setting: Setting, sites: Sequence[str], mask: Sequence[Sequence[int]] | str) -> Policy:
    """Copies of `sites` under a mask of steps x sites, as nested lists or the path of a file that holds them.

    Raises PolicyError for a file that cannot be read, a wrong shape, other values, or a first step that is not
    computed.
    """
    table = read_table(mask)
    if len(table) != setting.steps or any(len(row) != len(sites) or set(row) - {0, 1} for row in table):
        raise PolicyError(
            f"mask must be {setting.steps} steps of {len(sites)} numbers 0 or 1, one a branch in execution order "
            f"({sites[0]} ... {sites[-1]}); got {len(table)} rows of {sorted({len(row) for row in table})}"
        )
    if not all(table[0]):
        raise PolicyError("mask must begin with a row of ones: there is nothing to copy at the first step")
    columns = zip(*table, strict=True)
    return Policy(tuple(Cached(site, tuple(map(int, column))) for site, column in zip(sites, columns, strict=True)))


def read_table(table: Sequence[Sequence[float]] | str) -> list[list[float]]:
    """Rows of a table given as nested lists, or as the path of a .json file or of a .safetensors file of one tensor.

    Raises PolicyError for anything else, and for entries that are no numbers.
    """
    if isinstance(table, str):
        path, kind = table, "safetensors" if table.endswith(".safetensors") else "JSON"
        try:
            if kind == "safetensors":
                (table,) = (tensor.tolist() for tensor in load(read_bytes(path, PolicyError)).values())
            else:
                table = parse_json(read_bytes(path, PolicyError), path, PolicyError)
        except (PolicyError, KeyError, RuntimeError, TypeError, ValueError, SafetensorError) as error:  # odd dtypes too
            raise PolicyError(f"mask={path!r}: cannot be read as one {kind} table: {error}") from error
    if not isinstance(table, Sequence) or not all(isinstance(row, Sequence) for row in table):
        raise PolicyError("mask must be a list of rows, one per step, or a .json or .safetensors file that holds one")
    if not all(finite(value) or isinstance(value, bool) for row in table for value in row):
        raise PolicyError("mask must hold numbers only, finite ones, one per step and branch")
    rows: Any = table
    return [list(row) for row in rows]


def gram_of(setting: Setting, site: str) -> np.ndarray:
    """Inner products [step, step] of a site's values, summed over all streams of the profile.

    Raises ProfileError for a site that was not calibrated.
    """
    profile = setting.profile
    return np.sum([profile.matrix(site, stream).numpy() for stream in profile.streams], axis=0)


def changes(setting: Setting, site: str) -> np.ndarray:
    """Relative L1 change [step] of a site's values since the step before, mean over all streams of the profile."""
    return np.mean([setting.profile.change(site, stream).numpy() for stream in setting.profile.streams], axis=0)


def distances(setting: Setting, site: str, relative: bool = True) -> np.ndarray:
    """L2 distance [anchor, step] of a site's values to those of the step, over all streams of the profile.

    Divided by the norm at the step where `relative`.
    """
    gram = gram_of(setting, site)
    size = np.diag(gram)
    squared = np.maximum(size[:, None] + size[None] - 2 * gram, 0)
    return np.sqrt(squared / np.maximum(size[None], np.finfo(float).tiny) if relative else squared)


def similarity(setting: Setting, site: str) -> np.ndarray:
    """Cosine [step, step] of a site's values, over all streams of the profile; 0 where one is zero."""
    gram = gram_of(setting, site)
    norms = np.sqrt(np.diag(gram))
    return gram / np.maximum(norms[:, None] * norms[None], np.finfo(float).tiny)


def whole(least: int = 1, /, **values: int) -> None:
    """Raises PolicyError for a parameter that is not a whole number of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise PolicyError(f"{name}={value!r} must be a whole number of {least} or more")


def between(low: float, high: float, /, **values: float) -> None:
    """Raises PolicyError for a parameter that is not a number from `low` to `high`."""
    for name, value in values.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise PolicyError(f"{name}={value!r} must be a number from {low:g} to {high:g}")


def ends(window: Sequence[float], name: str = "window") -> tuple[float, float]:
    """The two ends of a window. Raises PolicyError for anything but two numbers in order."""
    if not isinstance(window, Sequence) or len(window) != 2 or isinstance(window, str):
        raise PolicyError(f"{name}={window!r} must be two numbers, from and to")
    low, high = window
    between(-math.inf, math.inf, **{name: low})
    between(low, math.inf, **{name: high})
    return low, high
