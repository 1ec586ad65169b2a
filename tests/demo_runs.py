"""The demo pipelines at few steps, on the eager backend: captured and calibrated once, then run under any policy."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import dcc
from dcc.discover.sites import Sites
from dcc.plans.plan import Plan
from dcc.policies import Setting, make_policy
from dcc.policies.setting import plan_for, setting_of
from dcc.quality import mean_psnr, psnr
from dcc.record.target import PipelineTarget

STEPS = 12
PROMPTS = dcc.demo.prompts("test")[:2]
CALIBRATION = dcc.demo.prompts("calib")[:2]
SEEDS = [0, 1]


class DemoRun:
    """One demo pipeline, its uncached images [2, C, H, W] in [0, 1], and what policies may look at."""

    def __init__(self, name: str, steps: int = STEPS) -> None:
        self.name, self.call = name, dcc.demo.settings(name) | {"num_inference_steps": steps}
        self.pipe = dcc.demo.load(name)
        self.expected = self.images()
        dcc.compile(self.pipe, CALIBRATION, policy="interval", interval=1, backend="eager", **self.call)
        self.base = dcc.compiled(self.pipe)
        dcc.restore(self.pipe)
        self.sites: Sites = dcc.sites(self.base)

    @property
    def target(self) -> PipelineTarget:
        """What runs the pipeline from prompts and seeds."""
        return PipelineTarget(self.pipe, self.call)

    @functools.cached_property
    def setting(self) -> Setting:
        """The run's levels, sites, and, measured when first asked for, the profile of two prompts."""
        return setting_of(self.base.subject, CALIBRATION, progress=lambda line: None)

    def plan(self, policy: str, **parameters: Any) -> Plan:
        """The costed plan of a policy."""
        decided = make_policy(policy, self.setting, parameters)
        return plan_for(decided, self.base.subject, policy, parameters)

    def images(self, net: dcc.CompiledDenoiser | None = None, prompts: Sequence[str] = PROMPTS) -> Tensor:
        """Images of the prompts, with `net` on the denoiser."""
        target = self.target
        if net is not None:
            target.install(net)
        try:
            return target.generate(list(prompts), SEEDS[: len(prompts)]).images
        finally:
            if net is not None:
                dcc.restore(self.pipe)

    def __call__(self, policy: str, **parameters: Any) -> tuple[Tensor, Any]:
        """Images under a policy, and the denoiser that drew them."""
        net = self.base.with_plan(self.plan(policy, **parameters))
        return self.images(net), net

    def psnr(self, images: Tensor) -> float:
        """Mean PSNR in dB to the uncached images."""
        return mean_psnr(psnr(images, self.expected, 1.0))


@functools.cache
def demo_run(name: str) -> DemoRun:
    """The pipeline of this name, once per test session."""
    torch.manual_seed(0)
    return DemoRun(name)
