"""How close cached images are to uncached ones, and how long both take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcc.errors import PromptError
from dcc.quality import psnr, ssim


@dataclass(frozen=True)
class Timing:
    """Images [n, 3, h, w] in [0, 1] on the CPU, and the seconds that each of them took."""

    images: Tensor
    seconds: list[float]

    @property
    def median(self) -> float:
        """Median seconds an image."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """The same prompts and seeds through two pipelines; PSNR (dB) and SSIM of `cached` against `reference`."""

    reference: Timing
    cached: Timing
    psnr: list[float]
    ssim: list[float]

    @property
    def ratio(self) -> float:
        """Median seconds an image, reference over cached: above 1 where caching is faster."""
        return self.reference.median / self.cached.median


def generate(pipe: Any, prompts: Sequence[str], *, seed: int = 0, **call: Any) -> Timing:
    """One call of `pipe` per prompt; the noise of prompt i comes from seed + i. `call` are arguments of the call."""
    _check_prompts(prompts)
    return _timing([_one(pipe, prompt, seed + i, call) for i, prompt in enumerate(prompts)])


def compare(
    reference: Any,
    cached: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    **call: Any,
) -> Comparison:
    """Runs two pipelines on the same prompts and seeds, in turn prompt by prompt, after one warm-up call of each.

    In turn, because whatever else the machine does then slows both alike. `progress` is called with one line before
    each call.
    """
    _check_prompts(prompts)
    say = progress or (lambda line: None)
    for index, pipe in enumerate((reference, cached)):
        say(f"warming up, run {index + 1} of 2")
        _one(pipe, prompts[0], seed, call)
    uncached_runs, cached_runs = [], []
    for i, prompt in enumerate(prompts):
        say(f"image {i + 1} of {len(prompts)}, uncached")
        uncached_runs.append(_one(reference, prompt, seed + i, call))
        say(f"image {i + 1} of {len(prompts)}, cached")
        cached_runs.append(_one(cached, prompt, seed + i, call))
    before, after = _timing(uncached_runs), _timing(cached_runs)
    return Comparison(before, after, psnr(after.images, before.images), ssim(after.images, before.images))


def _one(pipe: Any, prompt: str, seed: int, call: dict[str, Any]) -> tuple[Tensor, float]:
    """An image [1, 3, h, w] and its seconds; the copy to the CPU waits for the device, so it is inside the clock."""
    generator = torch.Generator("cpu").manual_seed(seed)
    start = time.perf_counter()
    image = pipe(prompt, generator=generator, output_type="pt", **call).images.float().cpu()
    return image, time.perf_counter() - start


def _timing(runs: Sequence[tuple[Tensor, float]]) -> Timing:
    return Timing(torch.cat([image for image, _ in runs]), [seconds for _, seconds in runs])


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise PromptError(f"prompts must be a list of at least one string, e.g. ['a red circle']; got {prompts!r}")
