"""What must hold where guidance comes as one merged batch [unconditional; conditional] and only half of it runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch

from dcc.capture.captured import Captured
from dcc.decisions import Decision
from dcc.discover.sites import Sites
from dcc.discover.token_grid import token_grid
from dcc.errors import PlanError
from dcc.passes.base import GUIDANCE, Site
from dcc.plans.forms import TokensForm
from dcc.plans.plan import Plan
from dcc.plans.predictors import Predictor
from dcc.record.call import Call

LOW_PART = 5  # FasterCache's low frequencies reach to a fifth of the shorter side
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative distance of equal halves; 2e-2 at lower precision


def forecasts_guidance(row: Sequence[int], selected: Sequence[Sequence[Site]]) -> bool:
    """Whether a row of the schedule runs the conditional half only."""
    return any(
        d != Decision.COMPUTE and any(s.kind == GUIDANCE for s in group) for d, group in zip(row, selected, strict=True)
    )


def check_plan(plan: Plan, selected: Sequence[Sequence[Site]]) -> None:
    """Raises PlanError where a step on the whole batch reads anchors that a step on half of it wrote, and where a step
    on half of it refreshes tokens, whose state is that of the whole batch."""
    halved = [forecasts_guidance(row, selected) for row in plan.schedule]
    for step, row in enumerate(plan.schedule if any(halved) else ()):
        for k, decision in enumerate(row):
            if decision == Decision.COMPUTE or any(site.kind == GUIDANCE for site in selected[k]):
                continue
            if halved[step] and isinstance(plan.form(k), TokensForm):
                raise PlanError(
                    f"step {step} forecasts 'uncond' and refreshes tokens of {plan.sites[k]!r}, whose state is that of "
                    "the whole batch; compute one of them"
                )
            late = [s for s in plan.anchor_steps(step, k) if halved[s]] if not halved[step] else []
            if late:
                raise PlanError(
                    f"step {step} runs the whole batch and forecasts {plan.sites[k]!r} from step {late[0]}, which ran "
                    f"half of it; compute {plan.sites[k]!r} at step {step}, or 'uncond' at step {late[0]}"
                )


def check_halves(sites: Sites) -> None:
    """Raises PlanError unless the conditional half of the recorded call, alone, gives that half of its output.

    Runs the captured graph twice. Sizes that capture has fixed, and values that mix the samples of a batch, show here.
    """
    if not _gives_its_half(sites.captured):
        raise PlanError(
            "'uncond' cannot be forecast: this denoiser computes something else for the conditional half of a batch "
            "alone than within the whole; choose other sites"
        )


def check_call(call: Call, moving: Collection[str]) -> None:
    """Raises PlanError unless both halves of the batch hold the same samples, as a merged guidance batch does.

    `moving` are the paths of the inputs that change from step to step. Reads the device once.
    """
    for name, tensor in zip(call.names, call.tensors, strict=True):
        if name in moving and tensor.dim() > 1 and (len(tensor) % 2 or not torch.equal(*tensor.chunk(2))):
            raise PlanError(
                f"{name}: the plan leaves out the unconditional half of a guidance batch, but this call's halves hold "
                "different samples; call with guidance as in the run that was compiled for, or compile for this one"
            )


def weighed_bands(
    sites: Sites, levels: Sequence[float], weights: Sequence[float], windows: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """FasterCache's form of `uncond` (arXiv 2410.19355): its low and high frequencies, each with a weight and a window.

    A band is multiplied by its weight at every step that reuses it at a timestep, of 1000, inside its window. The form
    is {} where both weights are 1. Low frequencies are at most min(H, W) // 5 waves across the picture, as released;
    the cosine transform, which takes the place of the released Fourier transform, counts half waves. An output of
    tokens whose grid no input tells is split along the tokens.
    """
    if all(weight == 1 for weight in weights):
        return {}
    predictors, scale = [], 1000 if max(levels) <= 1.0 + 1e-6 else 1
    for weight, (low, high) in zip(weights, windows, strict=True):
        inside = [step for step, level in enumerate(levels) if low < level * scale < high]
        since, until = (inside[0], inside[-1] + 1) if inside else (0, 0)
        options = (("rate", float(weight)), ("since", float(since)), ("until", float(until)))
        predictors.append(Predictor("growing", 0, options).as_json())
    shape = list(sites["uncond"].shapes[0])
    grid = shape[-2:] if len(shape) > 3 else token_grid(sites, shape[1])
    spec = {"transform": "fft", "cutoff": 2 / LOW_PART, "grid": None, "predictors": predictors}
    if grid is not None:
        radius = 2 * (min(grid) // LOW_PART) / max(math.hypot(grid[0] - 1, grid[1] - 1), 1)
        spec |= {"transform": "dct", "cutoff": min(radius, 1.0), "grid": list(grid) if len(shape) == 3 else None}
    return {"bands": spec}


def _gives_its_half(captured: Captured) -> bool:
    with torch.no_grad():
        (whole, *_) = captured.graph_module(*captured.inputs_of(captured.call))
        expected = whole[len(whole) // 2 :].float()
        try:
            half = captured.part(captured.call, slice(len(whole) // 2, None))
            (alone, *_) = captured.graph_module(*captured.inputs_of(half))
        except (RuntimeError, AssertionError, IndexError, ValueError):
            return False  # a size that capture fixed, or one that another input gives
    if alone.shape != expected.shape:
        return False
    return bool((alone.float() - expected).norm() <= ROUNDING.get(whole.dtype, 2e-2) * expected.norm())
