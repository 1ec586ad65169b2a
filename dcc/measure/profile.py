"""The profile: what calibration measured about one denoiser. One safetensors file with a readable header."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from dcc import arguments
from dcc.errors import ProfileError
from dcc.plans.fields import finite, read_fields, tuples, whole
from dcc.record.fingerprint import fingerprint, weights_hash
from dcc.tensor_file import read_tensors, write_tensors
from dcc.text import count, human_bytes, render

MARK, VERSION = "dcc_profile", 2
TENSORS = ("gram", "neighbours", "sensitivity")


@dataclass(frozen=True)
class SiteCost:
    """One site at the calibrated shapes: FLOPs and seconds that a forecast saves per call, and bytes of an anchor."""

    name: str
    kind: str
    flops: int
    bytes: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Profile:
    """How the features of one denoiser move from step to step; valid for one model, scheduler, dtype and run length.

    `gram` [streams, sites, S, S] float64 holds the mean inner product of a site's values at two steps, over prompts
    (estimated from sketches); `neighbours` [streams, sites, S] float32 the relative L1 change since the step before
    (0 at step 0); `sensitivity` [S] float32 how far the final sample moves per unit of noise in the output of one
    step, divided by its mean over steps, `sensitivity_scale`. Only the steps `probed` were measured, the others are
    interpolated. `flops` and `seconds` are those of one whole denoiser call, eager and node by node.
    """

    model: str
    weights: str
    scheduler: str
    dtype: str
    levels: tuple[float, ...]
    streams: tuple[str, ...]
    costs: tuple[SiteCost, ...]
    default: str
    flops: int
    seconds: float
    prompts: int
    seed: int
    probed: tuple[int, ...]
    sensitivity_scale: float
    gram: Tensor
    neighbours: Tensor
    sensitivity: Tensor
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, as `dcc.sites` gives them."""
        return tuple(cost.name for cost in self.costs)

    @property
    def steps(self) -> int:
        """The number of steps, S."""
        return len(self.levels)

    def cost(self, site: str) -> SiteCost:
        """What the site costs. Raises ProfileError for a site that was not calibrated."""
        return self.costs[self._site(site)]

    def matrix(self, site: str, stream: str | None = None) -> Tensor:
        """Gram matrix [S, S] float64 of a site, in the first stream unless one is named. Raises ProfileError."""
        return self.gram[self._stream(stream), self._site(site)]

    def similarity(self, site: str, stream: str | None = None) -> Tensor:
        """Cosine [S, S] float64 between the site's values at every two steps; 0 where a value is zero."""
        gram = self.matrix(site, stream)
        norms = gram.diagonal().sqrt()
        scale = norms[:, None] * norms[None]
        return torch.where(scale > 0, gram / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)

    def norms(self, site: str, stream: str | None = None) -> Tensor:
        """Root mean square [S] float64, over prompts, of the norm of a site's value."""
        return self.matrix(site, stream).diagonal().sqrt()

    def change(self, site: str, stream: str | None = None) -> Tensor:
        """Relative L1 change [S] float32 of a site since the step before; 0 at step 0."""
        return self.neighbours[self._stream(stream), self._site(site)]

    def error(
        self, site: str, step: int, anchors: Sequence[int], coefficients: Sequence[float], stream: str | None = None
    ) -> float:
        """Relative error of the forecast sum_j coefficients[j] * value(anchors[j]) of the site's value at `step`.

        ||forecast - value|| / ||value||, root mean square over prompts, if the anchors are true values. Infinite where
        the value is zero and the forecast is not. Raises ProfileError for steps or lengths that do not fit.
        """
        for name, values in (("anchors", anchors), ("coefficients", coefficients)):
            if not isinstance(values, Sequence):
                raise ProfileError(f"{name}={arguments.shown(values)} must be a list, with an entry for each anchor")
        if len(anchors) != len(coefficients):
            raise ProfileError(f"{len(anchors)} anchors and {len(coefficients)} coefficients; give one for each")
        bad = [s for s in (step, *anchors) if type(s) is not int or not 0 <= s < self.steps]
        if bad:
            raise ProfileError(f"step {arguments.shown(bad[0])} is not among the profile's steps 0 to {self.steps - 1}")
        for coefficient in coefficients:
            arguments.number("a number of coefficients", coefficient, ProfileError)
        gram = self.matrix(site, stream)
        weights = torch.zeros(self.steps, dtype=gram.dtype)
        weights[step] += 1.0
        for anchor, coefficient in zip(anchors, coefficients, strict=True):
            weights[anchor] -= coefficient
        missed, true = max(float(weights @ gram @ weights), 0.0), float(gram[step, step])
        if true == 0:
            return math.inf if missed > 0 else 0.0
        return math.sqrt(missed / true)

    def check(self, module: nn.Module, scheduler: Any, dtype: torch.dtype | str | None = None) -> None:
        """Raises ProfileError, naming the field, unless the profile belongs to this denoiser, scheduler and dtype.

        `scheduler` is the object or its class name; `dtype` is the module's where not given.
        """
        if not isinstance(module, nn.Module):
            raise ProfileError(f"module={arguments.shown(module)} must be the denoiser, an nn.Module")
        dtype = dtype if dtype is not None else dtype_of(module)
        own = {
            "model": fingerprint(module),
            "dtype": str(dtype).removeprefix("torch."),
            "weights": weights_hash(module),
            "scheduler": scheduler if isinstance(scheduler, str) else type(scheduler).__name__,
        }
        for name, value in own.items():
            if getattr(self, name) != value:
                raise ProfileError(
                    f"the profile is for another {name}: it has {name} {getattr(self, name)}, this run has {value}; "
                    "calibrate this one"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically: `path` holds the old file or the whole new one."""
        arguments.new_file("path", path, ProfileError)
        header = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in TENSORS}
        header["costs"] = [dataclasses.asdict(cost) for cost in self.costs]
        upper = torch.triu_indices(self.steps, self.steps)
        tensors = {
            "gram": self.gram[..., upper[0], upper[1]].contiguous(),
            "neighbours": self.neighbours.contiguous(),
            "sensitivity": self.sensitivity.contiguous(),
        }
        write_tensors(path, MARK, VERSION, header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Reads a profile that `save` wrote. Raises ProfileError, naming the file and the field, for anything else."""
        arguments.path("path", path, ProfileError)
        header, tensors = read_tensors(path, MARK, VERSION, ProfileError)
        try:
            parts = _fields(header)
            return cls(**parts | _unpacked(parts, tensors))
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture (format by suffix, e.g. .png) of similarity, change and sensitivity over the steps."""
        arguments.new_file("path", path, ProfileError)
        from dcc.measure.profile_plot import Curves, plot  # matplotlib takes a second to import; only pictures need it

        title = f"{count(self.prompts, 'prompt')}, {self.scheduler}, {count(self.steps, 'step')}, {self.dtype}"
        changes = {name: self.change(name).numpy() for name in self.sites}
        similarity = self.similarity(self.default).numpy()
        plot(Curves(title, self.default, similarity, changes, self.sensitivity.numpy(), list(self.probed)), path)

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Table:
        probed = f"{len(self.probed)} of {count(self.steps, 'step')} probed"
        table = Table(
            title=f"profile: {count(self.prompts, 'prompt')}, {self.scheduler}, {count(self.steps, 'step')}, "
            f"{self.dtype}, {self.flops / 1e9:.3f} GFLOP per call",
            caption=f"streams: {', '.join(self.streams)}; sensitivity: {probed}; change and cosine: mean over steps",
            title_justify="left",
            caption_justify="left",
        )
        for name in ("site", "kind", "FLOPs saved", "time saved", "anchor", "change per step", "1 - cosine per step"):
            table.add_column(name, justify="left" if name in ("site", "kind") else "right")
        branches = [cost.name for cost in self.costs if "/" in cost.name]
        for cost in self.costs:
            if "/" in cost.name:
                continue
            cosine = self.similarity(cost.name).diagonal(1)
            table.add_row(
                cost.name + (" *" if cost.name == self.default else ""),
                cost.kind,
                f"{cost.flops / self.flops:.1%}" if self.flops else "-",
                f"{cost.seconds / self.seconds:.1%}" if self.seconds else "-",
                human_bytes(cost.bytes),
                f"{float(self.change(cost.name)[1:].mean()) if self.steps > 1 else 0.0:.2%}",
                f"{float(1 - cosine.mean()) if self.steps > 1 else 0.0:.1e}",
            )
        if branches:
            table.add_row(f"and {len(branches)} branches", *[""] * 6)
        return table

    def _site(self, name: str) -> int:
        if name not in self.sites:
            raise ProfileError(f"no site {name!r} in this profile; it has: {', '.join(self.sites)}")
        return self.sites.index(name)

    def _stream(self, name: str | None) -> int:
        if name is None:
            return 0
        if name not in self.streams:
            raise ProfileError(f"no stream {name!r} in this profile; it has: {', '.join(self.streams)}")
        return self.streams.index(name)


def dtype_of(module: nn.Module) -> str:
    """The dtype of the module's first floating parameter, such as "bfloat16"; "float32" where it has none."""
    found = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return str(found).removeprefix("torch.")


def read_costs(data: Any) -> tuple[SiteCost, ...]:
    """Sites' costs as a file holds them. Raises ProfileError, naming what is wrong, for anything else."""
    if not isinstance(data, (list, tuple)) or not all(isinstance(cost, dict) for cost in data):
        raise ProfileError("field 'costs' is malformed: it must be a list of objects")
    costs = tuple(SiteCost(**read_fields(SiteCost, c, ProfileError, "field 'costs' is malformed: one")) for c in data)
    if bad := [cost for cost in costs if not _is_cost(cost)]:
        raise ProfileError(f"field 'costs' holds a malformed entry: {bad[:1]!r:.200}")
    if len({cost.name for cost in costs}) != len(costs):
        raise ProfileError("field 'costs' names a site twice")
    return costs


def check_tensor(tensor: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raises ProfileError, naming the field, unless the tensor has this shape and dtype and all of it is finite."""
    if not isinstance(tensor, Tensor):
        raise ProfileError(f"field {name!r} must be a tensor")
    if tensor.dtype != dtype:
        raise ProfileError(f"field {name!r} must be {dtype}, not {tensor.dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ProfileError(f"field {name!r} has shape {list(tensor.shape)}, not {list(shape)}")
    if not bool(tensor.isfinite().all()):
        raise ProfileError(f"field {name!r} holds NaN or infinite values")


def _fields(header: dict[str, Any]) -> dict[str, Any]:
    """The header's fields as the dataclass holds them."""
    wanted = [f.name for f in dataclasses.fields(Profile) if f.name not in TENSORS]
    if missing := [name for name in wanted if name not in header]:
        raise ProfileError(f"field {missing[0]!r} is missing")
    if unknown := [name for name in header if name not in wanted]:
        raise ProfileError(f"field {unknown[0]!r:.80} is unknown; there are: {', '.join(wanted)}")
    return {name: tuples(value) for name, value in header.items()} | {"costs": read_costs(header["costs"])}


def _unpacked(parts: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The tensors of a file, with whole Gram matrices made of their stored upper halves."""
    if set(tensors) != set(TENSORS):
        name = min(set(tensors) ^ set(TENSORS))
        raise ProfileError(f"field {name!r:.80} is {'unknown' if name in tensors else 'missing'}")
    steps, sites, streams = (len(p) if isinstance(p := parts[n], tuple) else 0 for n in ("levels", "costs", "streams"))
    packed = tensors["gram"]
    if tuple(packed.shape) != (streams, sites, steps * (steps + 1) // 2) or not packed.numel():
        pairs = steps * (steps + 1) // 2
        raise ProfileError(f"field 'gram' has shape {list(packed.shape)}, not {[streams, sites, pairs]}")
    upper = torch.triu_indices(steps, steps)
    gram = packed.new_zeros(*packed.shape[:2], steps, steps)
    gram[..., upper[0], upper[1]] = packed
    gram[..., upper[1], upper[0]] = packed
    return {"gram": gram, "neighbours": tensors["neighbours"], "sensitivity": tensors["sensitivity"]}


def _check(profile: Profile) -> None:
    def require(condition: bool, name: str, problem: str) -> None:
        if not condition:
            raise ProfileError(f"field {name!r} {problem}")

    for name in ("model", "weights", "scheduler", "dtype", "default"):
        value = getattr(profile, name)
        require(isinstance(value, str) and bool(value), name, "must be a non-empty string")
    for name in ("model", "weights"):
        value = getattr(profile, name)
        hexadecimal = len(value) == 16 and all(c in "0123456789abcdef" for c in value)
        require(hexadecimal, name, f"must be 16 hexadecimal digits, not {value!r}")
    for name in ("flops", "prompts", "seed"):
        value = getattr(profile, name)
        require(whole(value), name, f"must be a whole number from 0 on, not {value!r:.80}")
    for name in ("seconds", "sensitivity_scale"):
        value = getattr(profile, name)
        require(finite(value) and value >= 0, name, f"must be a finite number from 0 on, not {value!r:.80}")
    for name in ("settings", "versions"):
        require(isinstance(getattr(profile, name), dict), name, "must be an object")
    require(all(map(_is_text, profile.versions.values())), "versions", "must hold texts")
    for name, good in (("levels", finite), ("streams", _is_text), ("costs", _is_cost), ("probed", whole)):
        values = getattr(profile, name)
        require(isinstance(values, tuple) and bool(values), name, "must be a list with at least one entry")
        bad = [value for value in values if not good(value)]
        require(not bad, name, f"holds a malformed entry: {bad[:1]!r:.200}")
    steps, sites = len(profile.levels), len(profile.costs)
    require(profile.default in profile.sites, "default", f"is {profile.default!r}, which is none of the sites")
    require(len(set(profile.sites)) == sites, "costs", "names a site twice")
    require(all(step < steps for step in profile.probed), "probed", f"names a step beyond the {steps} levels")
    shapes = {
        "gram": (len(profile.streams), sites, steps, steps),
        "neighbours": (len(profile.streams), sites, steps),
        "sensitivity": (steps,),
    }
    for name, shape in shapes.items():
        check_tensor(getattr(profile, name), name, shape, torch.float64 if name == "gram" else torch.float32)
    require(bool((profile.gram.diagonal(dim1=-2, dim2=-1) >= 0).all()), "gram", "has a negative squared norm")
    require(torch.equal(profile.gram, profile.gram.mT), "gram", "is not symmetric")
    require(bool((profile.neighbours >= 0).all()), "neighbours", "holds negative values")
    require(bool((profile.sensitivity >= 0).all()), "sensitivity", "holds negative values")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_cost(value: Any) -> bool:
    return (
        isinstance(value, SiteCost)
        and _is_text(value.name)
        and _is_text(value.kind)
        and whole(value.flops)
        and whole(value.bytes)
        and finite(value.seconds)
        and value.seconds >= 0
    )
