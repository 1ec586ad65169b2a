"""Other libraries' caches on a bare denoiser, made to compute the same full steps, for speed.py."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import cases
import torch
from torch import Tensor, nn

INTERVAL, WARMUP = 4, 3
Sample = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Peer:
    """install(net, case, mask, compiled) gives a function that samples once."""

    name: str
    install: Callable[[nn.Module, cases.Case, list[int], bool], Callable[[Sample], Tensor]]


def full_steps(case: cases.Case) -> list[int]:
    """The steps that diffusers' TaylorSeer computes: the first few, then every INTERVAL-th."""
    return [int(step < WARMUP or (step - WARMUP + 1) % INTERVAL == 0) for step in range(case.steps)]


def hooked(config: Callable[[cases.Case, list[int]], Any]) -> Callable[..., Callable[[Sample], Tensor]]:
    """A cache of diffusers: hooks on the module, reset between runs."""

    def install(net: nn.Module, case: cases.Case, mask: list[int], compiled: bool) -> Callable[[Sample], Tensor]:
        net.enable_cache(config(case, mask))
        call = torch.compile(net) if compiled else net

        def run(sample: Sample) -> Tensor:
            with net.cache_context("cond"):
                result = sample(call, 0)
            net._reset_stateful_cache()
            return result

        return run

    return install


def taylorseer(lite: bool) -> Callable[[cases.Case, list[int]], Any]:
    """Every attention by default; in lite mode the output projection only."""

    def config(case: cases.Case, mask: list[int]) -> Any:
        from diffusers import TaylorSeerCacheConfig

        return TaylorSeerCacheConfig(
            cache_interval=INTERVAL,
            disable_cache_before_step=WARMUP,
            max_order=1,
            use_lite_mode=lite,
            cache_identifiers=None if lite else case.branches and list(case.branches),
            taylor_factors_dtype=case.dtype,
        )

    return config


def mag_cache(case: cases.Case, mask: list[int]) -> Any:
    """Even ratios and a skip limit, which give a full step every INTERVAL-th."""
    from diffusers import MagCacheConfig

    return MagCacheConfig(
        threshold=1e9,
        max_skip_steps=INTERVAL - 1,
        retention_ratio=WARMUP / case.steps,
        num_inference_steps=case.steps,
        mag_ratios=[1.0] * case.steps,
    )


def first_block_cache(net: nn.Module, case: cases.Case, mask: list[int], compiled: bool) -> Callable[[Sample], Tensor]:
    """It decides as it always does, with its own measurement; then the mask is what it answers."""
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks.first_block_cache import FBCHeadBlockHook

    decide, step = FBCHeadBlockHook._should_compute_remaining_blocks, [0]

    def by_mask(self: Any, residual: Tensor) -> bool:
        decide(self, residual)
        step[0] += 1
        return bool(mask[(step[0] - 1) % len(mask)])

    install = hooked(lambda case, mask: FirstBlockCacheConfig(threshold=0.1))
    inner = install(net, case, mask, compiled)

    def run(sample: Sample) -> Tensor:
        FBCHeadBlockHook._should_compute_remaining_blocks, step[0] = by_mask, 0
        try:
            return inner(sample)
        finally:
            FBCHeadBlockHook._should_compute_remaining_blocks = decide

    return run


def cache_dit(net: nn.Module, case: cases.Case, mask: list[int], compiled: bool) -> Callable[[Sample], Tensor]:
    """DBCache with a mask of steps: the first block computed, the others forecast by its Taylor calibrator."""
    import cache_dit

    for name in logging.getLogger("CACHE_DIT").manager.loggerDict:
        if name.lower().startswith("cache_dit"):
            logging.getLogger(name).setLevel(logging.ERROR)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=0.1,
        max_warmup_steps=1,
        num_inference_steps=case.steps,
        steps_computation_mask=mask,
        steps_computation_policy="static",
        enable_separate_cfg=False,
    )
    forecast = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    cache_dit.enable_cache(net, cache_config=config, calibrator_config=forecast)
    if compiled:
        cache_dit.set_compile_configs()
        net = torch.compile(net)
    inner = getattr(net, "_orig_mod", net)

    def run(sample: Sample) -> Tensor:
        cache_dit.refresh_context(inner, num_inference_steps=case.steps, verbose=False)
        return sample(net, 0)

    return run


def deepcache(net: nn.Module, case: cases.Case, mask: list[int], compiled: bool) -> Callable[[Sample], Tensor]:
    """The authors' package: everything below the outermost skip connection is copied; it takes even steps only."""
    from DeepCache import DeepCacheSDHelper

    levels = [case.scale * (1.0 - step / case.steps) for step in range(case.steps)]
    pipe = SimpleNamespace(unet=net, scheduler=SimpleNamespace(timesteps=torch.tensor(levels)))
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=round(case.steps / sum(mask)), cache_branch_id=0)
    helper.enable()
    call = torch.compile(net) if compiled else net
    return lambda sample: sample(lambda sample, timestep, **other: call(sample, timestep, **other), 0)


PEERS = (
    Peer("diffusers TaylorSeer", hooked(taylorseer(lite=False))),
    Peer("diffusers TaylorSeer lite", hooked(taylorseer(lite=True))),
    Peer("diffusers MagCache", hooked(mag_cache)),
    Peer("diffusers FirstBlockCache", first_block_cache),
    Peer("cache-dit F1B0, Taylor", cache_dit),
    Peer("DeepCache", deepcache),
)
