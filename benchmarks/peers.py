"""Other libraries' caches, as contestants of quality.py: the hooks of diffusers, cache-dit, DeepCache.

Libraries are imported inside the installers, so that a missing one costs its own rows only.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

from subjects import BUDGETS, Contestant, DoesNotRun, Knob, Subject, budgets, count_knob, evenly, interval_knob

import dcc


def peers(subject: Subject) -> Iterator[Contestant]:
    """All of them, at every budget."""
    yield from _diffusers(subject)
    yield from _cache_dit(subject)
    if subject.name == "unet":
        yield from budgets(
            Contestant(f"DeepCache branch {branch}", "DeepCache", deepcache, {"branch": branch}, interval_knob(subject))
            for branch in (0, 1, 2)
        )


@contextlib.contextmanager
def diffusers_cache(subject: Subject, pipe: Any, config: Any) -> Iterator[None]:
    """A cache configuration of diffusers, by enable_cache; by hand on a denoiser that has none (U-Net)."""
    from diffusers import hooks
    from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

    net = subject.target(pipe).module
    if hasattr(net, "enable_cache"):
        net.enable_cache(config)
        yield
        net.disable_cache()
        return
    apply = {
        "FirstBlockCacheConfig": hooks.apply_first_block_cache,
        "TaylorSeerCacheConfig": hooks.apply_taylorseer_cache,
        "MagCacheConfig": hooks.apply_mag_cache,
        "PyramidAttentionBroadcastConfig": hooks.apply_pyramid_attention_broadcast,
        "FasterCacheConfig": hooks.apply_faster_cache,
        "SeaCacheConfig": hooks.apply_sea_cache,
    }[type(config).__name__]
    apply(net, config)
    hooked = [m for m in net.modules() if getattr(getattr(m, "_diffusers_hook", None), "hooks", None)]
    if not hooked:
        raise DoesNotRun(f"{type(config).__name__} finds nothing to hook in {type(net).__name__}")

    def reset(recurse: bool = True) -> None:  # the pipeline calls this after every image, where it is there
        HookRegistry.check_if_exists_or_initialize(net).reset_stateful_hooks(recurse=recurse)
        _set_cache_context(net, CacheContext("merged"))

    net._reset_stateful_cache = reset
    reset()
    yield


@contextlib.contextmanager
def first_block_cache(subject: Subject, pipe: Any, threshold: float) -> Iterator[None]:
    """FBCache: the whole stack reused while the first block's residual moves little."""
    from diffusers import FirstBlockCacheConfig

    with diffusers_cache(subject, pipe, FirstBlockCacheConfig(threshold=threshold)):
        yield


# every residual branch, where the library's default is the attention of transformers: (forecast, left out)
BRANCHES = {
    "mmdit": (
        [r"transformer_blocks\.\d+\.(attn|ff|ff_context)", r"single_transformer_blocks\.\d+\.proj_out"],
        [r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"],
    ),
    "unet": ([r".*\.resnets\.\d+", r".*\.transformer_blocks\.\d+\.(attn1|attn2|ff)"], None),
}


@contextlib.contextmanager
def taylorseer(
    subject: Subject, pipe: Any, interval: int, order: int, place: str = "default", dtype: str = "float32"
) -> Iterator[None]:
    """TaylorSeer at its default modules, in lite mode (the output projection only), or at every branch by name."""
    import torch
    from diffusers import TaylorSeerCacheConfig

    forecast, left_out = BRANCHES[subject.name] if place == "branches" else (None, None)
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=order,
        use_lite_mode=place == "lite",
        cache_identifiers=forecast,
        skip_predict_identifiers=left_out,
        taylor_factors_dtype=getattr(torch, dtype),
    )
    with diffusers_cache(subject, pipe, config):
        yield


@functools.cache
def mag_ratios(subject: Subject) -> list[float]:
    """MagCache's magnitude ratios, by its own calibration run on 8 calibration prompts, which prints them."""
    from diffusers import MagCacheConfig

    printed, config = io.StringIO(), MagCacheConfig(num_inference_steps=subject.steps, calibrate=True)
    pipe = subject.fresh()
    with diffusers_cache(subject, pipe, config), contextlib.redirect_stdout(printed):
        subject.target(pipe).sample(dcc.demo.prompts("calib")[:8])
    return ast.literal_eval(next(line for line in printed.getvalue().splitlines() if line.startswith("[1.0")))


@contextlib.contextmanager
def mag_cache(subject: Subject, pipe: Any, threshold: float, max_skip: int, retention: float) -> Iterator[None]:
    """MagCache with ratios calibrated on this pipeline."""
    from diffusers import MagCacheConfig

    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=max_skip,
        retention_ratio=retention,
        num_inference_steps=subject.steps,
        mag_ratios=mag_ratios(subject),
    )
    with diffusers_cache(subject, pipe, config):
        yield


def _timestep(subject: Subject, pipe: Any) -> Callable[[], float]:
    """The timestep of the running call, which the U-Net's pipeline does not tell."""
    seen = [0.0]

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[1] if len(args) > 1 else kwargs["timestep"]  # one number, or one per sample
        seen[0] = float(value.flatten()[0]) * (1000 if subject.name == "mmdit" else 1)

    subject.target(pipe).module.register_forward_pre_hook(note, with_kwargs=True)
    return lambda: seen[0]


@contextlib.contextmanager
def attention_broadcast(subject: Subject, pipe: Any, skip: int, everywhere: bool) -> Iterator[None]:
    """Pyramid Attention Broadcast, in its default range of timesteps or at all of them."""
    from diffusers import PyramidAttentionBroadcastConfig

    window = (-1, 1001) if everywhere else (100, 800)
    cross = {} if subject.name == "mmdit" else {"cross_attention_block_skip_range": skip}
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip,
        spatial_attention_timestep_skip_range=window,
        cross_attention_timestep_skip_range=window,
        current_timestep_callback=_timestep(subject, pipe),
        **cross,
    )
    with diffusers_cache(subject, pipe, config):
        yield


@contextlib.contextmanager
def faster_cache(subject: Subject, pipe: Any, skip: int) -> Iterator[None]:
    """FasterCache: attention extrapolated, and the unconditional half where guidance is merged in the batch."""
    from diffusers import FasterCacheConfig

    config = FasterCacheConfig(
        spatial_attention_block_skip_range=skip,
        is_guidance_distilled=subject.name == "mmdit",
        tensor_format="BCHW",
        current_timestep_callback=_timestep(subject, pipe),
    )
    with diffusers_cache(subject, pipe, config):
        yield


@contextlib.contextmanager
def sea_cache(subject: Subject, pipe: Any, threshold: float, order: int = 1, max_cached: int = 0) -> Iterator[None]:
    """SeaCache; FluxPipeline tells it neither step nor noise level nor latents, so they are handed over here."""
    from diffusers import SeaCacheConfig

    net = subject.target(pipe).module
    side = subject.call["height"] // pipe.vae_scale_factor // 2

    def latents(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        tokens = kwargs["hidden_states"]
        return list(tokens.transpose(1, 2).reshape(len(tokens), -1, 1, side, side))

    if hasattr(net, "cache_context"):
        plain = net.cache_context

        def informed(name: str, **fields: Any) -> Any:
            levels = pipe.scheduler.timesteps.tolist()
            step = levels.index(float(pipe.current_timestep))
            return plain(name, step_index=step, sigma=levels[step] / 1000, num_inference_steps=len(levels), **fields)

        net.cache_context = informed
    config = SeaCacheConfig(
        threshold=threshold, residual_order=order, max_consecutive_cached=max_cached, raw_vision_callback=latents
    )
    with diffusers_cache(subject, pipe, config):
        yield


def _diffusers(subject: Subject) -> Iterator[Contestant]:
    threshold = Knob("threshold", low=1e-3, high=30.0)

    def variants() -> Iterator[Contestant]:
        yield Contestant("FirstBlockCache", "diffusers FirstBlockCache", first_block_cache, {}, threshold, dynamic=True)
        for order in (1, 2):
            for place in ("default", "branches", "lite"):
                options = {"order": order, "place": place}
                label = f"TaylorSeer {place} order {order}"
                yield Contestant(label, "diffusers TaylorSeer", taylorseer, options, interval_knob(subject))
        options = {"order": 1, "place": "lite", "dtype": "bfloat16"}
        yield Contestant("TaylorSeer lite, bf16", "diffusers TaylorSeer", taylorseer, options, interval_knob(subject))
        for order in (0, 1):
            options = {"order": order}
            yield Contestant(
                f"SeaCache order {order}", "diffusers SeaCache", sea_cache, options, threshold, dynamic=True
            )

    yield from budgets(variants())
    for budget in BUDGETS:
        for retention, skip in ((0.2, math.ceil(budget)), (0.1, math.ceil(budget)), (0.1, math.ceil(2 * budget))):
            options = {"max_skip": skip, "retention": retention}
            name = f"MagCache K={skip} R={retention} @ {budget:g}x"
            yield Contestant(name, "diffusers MagCache", mag_cache, options, threshold, budget)
    for skip in (2, 3, 5, 10):
        for everywhere in (False, True):
            name = f"PAB every {skip}{', all timesteps' if everywhere else ''}"
            options = {"skip": skip, "everywhere": everywhere}
            yield Contestant(name, "diffusers PAB", attention_broadcast, options)
    for skip in (2, 4):
        yield Contestant(f"FasterCache every {skip}", "diffusers FasterCache", faster_cache, {"skip": skip})


@contextlib.contextmanager
def cache_dit_cache(
    subject: Subject,
    pipe: Any,
    threshold: float = 0.0,
    blocks: tuple[int, int] = (1, 0),
    warmup: int = 1,
    calibrator: str = "",
    full_steps: int = 0,
    preset: str = "",
) -> Iterator[None]:
    """DBCache by threshold, or by a mask of steps: evenly spread `full_steps`, or a `preset` of the library."""
    import cache_dit

    for name in logging.getLogger("CACHE_DIT").manager.loggerDict:
        if name.lower().startswith("cache_dit"):
            logging.getLogger(name).setLevel(logging.ERROR)
    mask = cache_dit.steps_mask(total_steps=subject.steps, mask_policy=preset) if preset else None
    mask = evenly(subject.steps, full_steps) if full_steps else mask
    kind, _, order = calibrator.partition(" ")
    forecast = {
        "": lambda: None,
        "taylorseer": lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=int(order)),
        "foca": cache_dit.FoCaCalibratorConfig,
        "dmd": cache_dit.DMDCalibratorConfig,
    }[kind]()
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=blocks[0],
        Bn_compute_blocks=blocks[1],
        residual_diff_threshold=threshold,
        max_warmup_steps=warmup,
        num_inference_steps=subject.steps,
        steps_computation_mask=mask,
        steps_computation_policy="static" if mask else "dynamic",
    )
    try:
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=forecast)
    except (ValueError, AssertionError) as error:
        raise DoesNotRun(f"cache-dit: {error}") from error
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


def _cache_dit(subject: Subject) -> Iterator[Contestant]:
    forecasts = ("", "taylorseer 1", "taylorseer 2", "foca", "dmd")
    threshold = Knob("threshold", low=1e-3, high=30.0)

    def variants() -> Iterator[Contestant]:
        plain, taylor = ("",), ("taylorseer 1", "taylorseer 2")
        for blocks, warmup, calibrators in (
            ((1, 0), 1, forecasts),
            ((1, 0), 4, plain + taylor),
            ((2, 0), 1, plain + taylor),
            ((4, 0), 1, plain + taylor),  # the library's default of 8 is half of a model of 16 blocks or more
            ((1, 1), 1, plain + taylor),
        ):
            for calibrator in calibrators:
                family = "cache-dit DBCache" + (" + calibrator" if calibrator else "")
                name = f"DBCache F{blocks[0]}B{blocks[1]} W{warmup} {calibrator}".rstrip()
                options = {"blocks": blocks, "warmup": warmup, "calibrator": calibrator}
                yield Contestant(name, family, cache_dit_cache, options, threshold, dynamic=True)
        for calibrator in forecasts:
            name = f"DBCache even mask {calibrator}".rstrip()
            options = {"calibrator": calibrator}
            yield Contestant(name, "cache-dit steps_mask", cache_dit_cache, options, count_knob(subject))

    if subject.name == "unet":
        yield Contestant("DBCache F1B0", "cache-dit DBCache", cache_dit_cache, {"threshold": 0.1}, dynamic=True)
        return
    yield from budgets(variants())
    for preset in ("slow", "medium", "fast", "ultra"):
        for calibrator in forecasts:
            options = {"preset": preset, "calibrator": calibrator}
            name = f"DBCache mask {preset} {calibrator}".rstrip()
            yield Contestant(name, "cache-dit steps_mask", cache_dit_cache, options)


@contextlib.contextmanager
def deepcache(subject: Subject, pipe: Any, interval: int, branch: int) -> Iterator[None]:
    """The authors' package: everything deeper than one skip branch of the U-Net is copied."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    yield
    helper.disable()
