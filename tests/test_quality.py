"""PSNR and SSIM against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dcc.quality import are_images, frames, mean_psnr, psnr, spread, ssim


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


@pytest.mark.parametrize("shape", [(7,), (5, 2), (4, 8, 8), (2, 3, 8, 8)])
def test_psnr_takes_any_shape(shape: tuple[int, ...]):
    reference = torch.rand(3, *shape)
    assert psnr(reference + 0.1, reference) == pytest.approx([20.0] * 3, rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 3, 16, 24), (2, 1, 3, 16, 24)),
        ((2, 1, 16, 24), (2, 1, 1, 16, 24)),
        ((2, 16, 24, 3), (2, 1, 3, 16, 24)),
        ((2, 5, 3, 16, 24), (2, 5, 3, 16, 24)),
        ((2, 5, 16, 24, 3), (2, 5, 3, 16, 24)),
        ((2, 4, 16, 16), None),
        ((2, 3, 8, 8), None),
        ((2, 100), None),
    ],
)
def test_images_and_videos_are_told_by_their_shape(shape: tuple[int, ...], expected: tuple[int, ...] | None):
    found = frames(torch.rand(shape))
    assert (None if found is None else tuple(found.shape)) == expected


def test_ssim_of_a_video_is_the_mean_over_its_frames():
    images, reference = pairs(4)
    video = ssim(images[None], reference[None])
    assert video == pytest.approx([sum(ssim(images, reference)) / 4], rel=1e-5)
    with pytest.raises(ValueError, match="not images"):
        ssim(torch.rand(2, 4, 16, 16), torch.rand(2, 4, 16, 16))


def test_latents_are_no_images():
    assert are_images(torch.rand(1, 3, 16, 16))
    assert not are_images(3 * torch.randn(1, 3, 16, 16))


def test_an_identical_sample_does_not_hide_the_others_in_a_mean():
    assert mean_psnr([math.inf, math.inf]) == math.inf
    assert mean_psnr([math.inf, 30.0]) == 65.0
    assert mean_psnr([20.0, 30.0]) == 25.0


def test_spread():
    assert spread(torch.tensor([-1.0, 3.0])) == 4.0
    assert spread(torch.ones(3)) == 1.0
