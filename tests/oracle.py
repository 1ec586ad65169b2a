"""The oracle of cached sampling: the eager module with forward hooks that store and replace values step by step.

Shares no code with dcc: where a site is (`SITES`, by module paths) and what a forecast is (`FORECASTS`, in other forms
than dcc's coefficients, in float64) are written down here a second time.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Made:
    """A tensor that a module returns: the leaves of its flattened output that hold it."""

    module: str
    leaves: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Taken:
    """A tensor that a module is called with, by the name of its parameter."""

    module: str
    name: str = "hidden_states"


@dataclass(frozen=True)
class Tap:
    """One cached tensor: what is made, less what is taken."""

    out: Made
    base: Taken | None = None


Anchors = list[tuple[int, Tensor]]  # (step, value), oldest first


def copy(anchors: Anchors, step: int, order: int) -> Tensor:
    """The newest value."""
    return anchors[-1][1]


def taylor(anchors: Anchors, step: int, order: int) -> Tensor:
    """TaylorSeer as published: a list of differences, renewed at each computed step from the list before it."""
    differences: list[Tensor] = []
    last = 0
    for at, value in anchors:
        renewed = [value.double()]
        for level in range(min(order, len(differences))):
            renewed.append((renewed[level] - differences[level]) / (at - last))
        differences, last = renewed, at
    return sum(d * (step - last) ** i / math.factorial(i) for i, d in enumerate(differences))


def newton(anchors: Anchors, step: int, order: int) -> Tensor:
    """The polynomial through the newest `order` + 1 values at `step`, by Neville's scheme."""
    used = anchors[-(order + 1) :]
    values = [value.double() for _, value in used]
    steps = [at for at, _ in used]
    for width in range(1, len(used)):
        values = [
            ((step - steps[i + width]) * values[i] + (steps[i] - step) * values[i + 1]) / (steps[i] - steps[i + width])
            for i in range(len(values) - 1)
        ]
    return values[0]


FORECASTS: dict[str, Callable[[Anchors, int, int], Tensor]] = {"copy": copy, "taylor": taylor, "newton": newton}


@dataclass(frozen=True)
class Cached:
    """What one selector of a plan asks for: its taps, a mask of its computed steps, and its forecast."""

    taps: tuple[Tap, ...]
    computed: tuple[int, ...]
    forecast: str = "copy"
    order: int = 0


@dataclass
class History:
    """State of one generation (of one stream): the anchors of every tap of every selector."""

    anchors: dict[tuple[int, Tap], Anchors] = field(default_factory=dict)


class Oracle:
    """Calls `module` at a step of a plan, the cached taps of `selectors` stored or replaced by hooks.

    Where taps share a module, those of earlier selectors are served first.
    """

    def __init__(self, module: nn.Module, selectors: Sequence[Cached]) -> None:
        self.module, self.selectors = module, selectors

    def __call__(self, history: History, step: int, kwargs: dict[str, Any]) -> Tensor:
        """The first output of the call."""
        with self._hooks(history, step):
            return pytree.tree_leaves(self.module(**kwargs))[0]

    @contextmanager
    def _hooks(self, history: History, step: int) -> Iterator[None]:
        taken: dict[Taken, Tensor] = {}
        handles = []
        for k, selector in enumerate(self.selectors):
            for tap in selector.taps:
                if tap.base is not None:
                    owner = self.module.get_submodule(tap.base.module)
                    handles.append(owner.register_forward_pre_hook(_keep(taken, tap.base), with_kwargs=True))
                owner = self.module.get_submodule(tap.out.module)
                handles.append(owner.register_forward_hook(self._serve(history, step, k, tap, taken)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _serve(
        self, history: History, step: int, k: int, tap: Tap, taken: dict[Taken, Tensor]
    ) -> Callable[[nn.Module, Any, Any], Any]:
        selector = self.selectors[k]

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            leaves, spec = pytree.tree_flatten(output)
            anchors = history.anchors.setdefault((k, tap), [])
            true = leaves[tap.out.leaves[0]]
            base = taken[tap.base] if tap.base is not None else None
            if selector.computed[step]:
                anchors.append((step, true.clone() if base is None else true - base))
                return None
            value = FORECASTS[selector.forecast](anchors, step, selector.order).to(true.dtype)
            for leaf in tap.out.leaves:
                leaves[leaf] = value if base is None else base + value
            return pytree.tree_unflatten(leaves, spec)

        return hook


def _keep(taken: dict[Taken, Tensor], what: Taken) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        taken[what] = inspect.signature(module.forward).bind(*args, **kwargs).arguments[what.name]

    return hook


Sites = dict[str, tuple[Tap, ...]]


def _flux(double: int = 2, single: int = 3) -> Sites:
    """Double blocks give (text, image) and carry both streams; of the last single block only the image is used."""

    def text(first: str, last: str) -> Tap:
        return Tap(Made(last), Taken(first, "encoder_hidden_states"))

    def image(first: str, last: str) -> Tap:
        return Tap(Made(last, (1,)), Taken(first))

    doubles = [f"transformer_blocks.{i}" for i in range(double)]
    singles = [f"single_transformer_blocks.{i}" for i in range(single)]
    order = [*doubles, *singles]
    sites: Sites = {}
    for path in doubles:
        sites[f"{path}/attn"] = (Tap(Made(f"{path}.attn")),)
        sites[f"{path}/attn.1"] = (Tap(Made(f"{path}.attn", (1,))),)
        sites[f"{path}/mlp"] = (Tap(Made(f"{path}.ff")),)
        sites[f"{path}/mlp.1"] = (Tap(Made(f"{path}.ff_context")),)
    for path in singles:
        sites[f"{path}/attn+mlp"] = (Tap(Made(f"{path}.proj_out")),)
    for path in order:
        sites[path] = (image(path, path),) if path == order[-1] else (text(path, path), image(path, path))
    sites["blocks[1:3]"] = (text(order[1], order[2]), image(order[1], order[2]))
    sites["blocks[2:4]"] = (text(order[2], order[3]), image(order[2], order[3]))
    sites["blocks[1:5]"] = (image(order[1], order[4]),)
    sites["transformer_blocks"] = (text(doubles[0], doubles[-1]), image(doubles[0], doubles[-1]))
    sites["single_transformer_blocks"] = (image(singles[0], singles[-1]),)
    sites["stack"] = (image(order[0], order[-1]),)
    sites["hidden"] = (Tap(Made(order[-1], (1,))),)
    return sites | {"output": (Tap(Made("")),)}


def _pixart(depth: int = 3) -> Sites:
    order = [f"transformer_blocks.{i}" for i in range(depth)]
    sites: Sites = {}
    for path in order:
        sites[f"{path}/attn"] = (Tap(Made(f"{path}.attn1")),)
        sites[f"{path}/cross"] = (Tap(Made(f"{path}.attn2")),)
        sites[f"{path}/mlp"] = (Tap(Made(f"{path}.ff")),)
    for path in order:
        sites[path] = (Tap(Made(path), Taken(path)),)
    sites["blocks[0:2]"] = (Tap(Made(order[1]), Taken(order[0])),)
    sites["blocks[1:3]"] = (Tap(Made(order[2]), Taken(order[1])),)
    sites["stack"] = (Tap(Made(order[-1]), Taken(order[0])),)
    return sites | {"output": (Tap(Made("")),)}


def _unet() -> Sites:
    """A down block gives (sample, skips), and its last skip is the sample; the first skip rides on its input."""
    skip = Tap(Made("down_blocks.0", (1,)), Taken("down_blocks.0"))
    down = Tap(Made("down_blocks.0", (0, 2)))
    deep = Tap(Made("down_blocks.1", (0, 1)))
    first = Tap(Made("mid_block.resnets.0"), Taken("mid_block.resnets.0", "input_tensor"))
    second = Tap(Made("mid_block.resnets.1"), Taken("mid_block.resnets.1", "input_tensor"))
    attention = Tap(Made("mid_block.attentions.0"), Taken("mid_block.attentions.0"))
    inner = "down_blocks.0.attentions.0.transformer_blocks.0"
    return {
        f"{inner}/attn": (Tap(Made(f"{inner}.attn1")),),
        f"{inner}/cross": (Tap(Made(f"{inner}.attn2")),),
        f"{inner}/mlp": (Tap(Made(f"{inner}.ff")),),
        "down_blocks.0/attn": (Tap(Made("down_blocks.0.attentions.0.proj_out")),),
        "down_blocks.0/conv": (Tap(Made("down_blocks.0.resnets.0.conv2")),),
        "mid_block.resnets.1/conv": (Tap(Made("mid_block.resnets.1.conv2")),),
        "mid_block.attentions.0/attn": (Tap(Made("mid_block.attentions.0.proj_out")),),
        "up_blocks.1.attentions.1/attn": (Tap(Made("up_blocks.1.attentions.1.proj_out")),),
        "down_blocks.0": (skip, down),
        "down_blocks.1": (deep,),
        "mid_block.resnets.0": (first,),
        "mid_block.attentions.0": (attention,),
        "mid_block.resnets.1": (second,),
        "up_blocks.0": (Tap(Made("up_blocks.0")),),
        "up_blocks.1": (Tap(Made("up_blocks.1")),),
        "blocks[2:5]": (Tap(second.out, first.base),),
        "down_blocks": (skip, down, deep),
        "mid_block.resnets": (first, second),
        "mid_block.attentions": (attention,),
        "cut:3": (Tap(second.out),),
        "cut:2": (Tap(Made("up_blocks.0.resnets.0")),),
        "level:1": (Tap(Made("up_blocks.0.resnets.1")),),  # all of the coarser level, before the upsampler
        "cut:1": (Tap(Made("up_blocks.0")),),
        "cut:0": (Tap(Made("up_blocks.1.attentions.0")),),
        "hidden": (Tap(Made("up_blocks.1")),),
        "output": (Tap(Made("")),),
    }


SITES: dict[str, Sites] = {"flux": _flux(), "pixart": _pixart(), "unet-sd": _unet()}


def _is_block(name: str) -> bool:
    return name.rpartition(".")[2].isdigit() and "/" not in name


GROUPS: dict[str, Callable[[str], bool]] = {
    "blocks": _is_block,
    "branches": lambda name: "/" in name,
    "attn": lambda name: "/attn" in name or "/cross" in name,
    "mlp": lambda name: "/mlp" in name,
}


def taps(model: str, selector: str) -> tuple[Tap, ...]:
    """The taps of a site or of a group of sites of one of the models of `SITES`."""
    if selector not in GROUPS:
        return SITES[model][selector]
    return tuple(tap for name, found in SITES[model].items() if GROUPS[selector](name) for tap in found)
