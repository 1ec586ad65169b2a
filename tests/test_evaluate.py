"""PSNR and SSIM against their definitions; runs of the same prompts and seeds through two pipelines."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dcc.errors import PromptError
from dcc.evaluate import Timing, compare, generate, psnr, ssim


class Pipe:
    """Stands in for a pipeline: an image [1, 3, 16, 16] of the generator's noise plus `shift`; notes every call."""

    def __init__(self, shift: float = 0.0, log: list[str] | None = None, name: str = "pipe") -> None:
        self.shift, self.log, self.name = shift, [] if log is None else log, name

    def __call__(self, prompt: str, generator: torch.Generator, output_type: str, steps: int) -> SimpleNamespace:
        assert output_type == "pt" and steps == 7
        self.log.append(f"{self.name}: {prompt}")
        noise = torch.rand(1, 3, 16, 16, generator=generator, dtype=torch.float64) * 0.5
        return SimpleNamespace(images=noise + self.shift)


def pairs(n: int = 3) -> tuple[Tensor, Tensor]:
    reference = torch.rand(n, 3, 32, 24)
    return (reference + 0.1 * torch.randn_like(reference)).clamp(0, 1), reference


def test_psnr_is_ten_log_of_range_squared_over_the_mean_square_of_each_image():
    images, reference = pairs()
    expected = [10 * math.log10(1 / float(((a - b) ** 2).mean())) for a, b in zip(images, reference, strict=True)]
    assert psnr(images, reference) == pytest.approx(expected, rel=1e-5)
    wider = [value + 20 * math.log10(2) for value in expected]
    assert psnr(images, reference, data_range=2.0) == pytest.approx(wider, rel=1e-5)


def test_equal_images_have_infinite_psnr_and_ssim_of_one():
    images, reference = pairs()
    images[1] = reference[1]
    assert psnr(images, reference)[1] == math.inf
    assert ssim(images, reference)[1] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("n", [1, 3])
def test_both_give_one_number_an_image_that_does_not_depend_on_the_others(n: int):
    images, reference = pairs(n)
    for measure in (psnr, ssim):
        alone = [measure(images[i : i + 1], reference[i : i + 1])[0] for i in range(n)]
        assert measure(images, reference) == pytest.approx(alone, rel=1e-5)


def test_ssim_falls_with_noise():
    _, reference = pairs(1)
    noise = torch.randn_like(reference)
    values = [ssim((reference + level * noise).clamp(0, 1), reference)[0] for level in (0.02, 0.1, 0.5)]
    assert 1 > values[0] > values[1] > values[2]


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_images_that_do_not_pair_up_are_refused(measure):
    with pytest.raises(ValueError, match=r"\[2, 3, 8, 8\] and reference \[1, 3, 8, 8\]"):
        measure(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="float"):
        measure(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_generate_seeds_each_prompt_by_its_place():
    timing = generate(Pipe(), ["a", "b"], seed=5, steps=7)
    assert timing.images.shape == (2, 3, 16, 16) and timing.images.dtype == torch.float32
    assert len(timing.seconds) == 2 and all(s > 0 for s in timing.seconds)
    again = generate(Pipe(), ["b"], seed=6, steps=7)
    assert torch.equal(timing.images[1:], again.images)


def test_compare_warms_up_and_takes_turns():
    log: list[str] = []
    lines: list[str] = []
    result = compare(Pipe(0, log, "ref"), Pipe(0.1, log, "own"), ["a", "b"], progress=lines.append, steps=7)
    assert log == ["ref: a", "own: a", "ref: a", "own: a", "ref: b", "own: b"]
    assert lines[-1] == "image 2 of 2, cached" and len(lines) == 6
    assert result.psnr == pytest.approx([20, 20], rel=1e-4)
    assert len(result.ssim) == 2
    assert result.ratio == result.reference.median / result.cached.median


def test_the_median_is_over_images():
    assert Timing(torch.zeros(3, 3, 8, 8), [9.0, 1.0, 2.0]).median == 2.0


@pytest.mark.parametrize("prompts", [[], "a red circle"])
def test_no_prompts_are_refused(prompts):
    with pytest.raises(PromptError, match="list of at least one string"):
        compare(Pipe(), Pipe(), prompts, steps=7)
    with pytest.raises(PromptError, match="list of at least one string"):
        generate(Pipe(), prompts, steps=7)
