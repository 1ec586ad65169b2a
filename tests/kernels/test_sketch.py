"""Sketches: inner products hold for the features that transformers and U-Nets have; linear, small, fixed."""

import hashlib
import subprocess
import sys

import pytest
import torch

from dcc.kernels.sketch import COORDINATES, ROWS, SIZE, coordinates, launch, op, reference

TOKENS, CHANNELS, DRAWS = 64, 384, 60


def shared_mean():
    """All tokens share a mean, as after a modulation."""
    return torch.randn(1, CHANNELS) + 0.3 * torch.randn(TOKENS, CHANNELS)


def constant():
    return torch.ones(TOKENS, CHANNELS) + 0.3 * torch.randn(TOKENS, CHANNELS)


def loud_channel():
    """One channel is 50 times as large as the others in every token."""
    return torch.randn(TOKENS, CHANNELS) + 50 * (torch.arange(CHANNELS) == 7)


def channel_means():
    """A mean for every channel, channels first, as in a U-Net."""
    return torch.randn(CHANNELS, 1) + 0.3 * torch.randn(CHANNELS, TOKENS)


def independent():
    return torch.randn(TOKENS, CHANNELS)


FEATURES = [independent, shared_mean, constant, loud_channel, channel_means]


def sketched(*features):
    """Sketches [v, SIZE] of features without a batch."""
    values = torch.stack(features)[:, None]
    return reference(values, values[0])[:, 0].double()


@pytest.mark.parametrize("feature", FEATURES)
def test_inner_products_are_unbiased_and_close(feature):
    """Random features under the fixed signs stand for fixed features under random signs."""
    ratios = []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        a = feature()
        b = a + 0.5 * feature()
        flips = torch.randint(0, 2, a.shape) * 2.0 - 1  # as good as other signs in the sketch
        left, right = sketched(a * flips, b * flips)
        ratios.append(float(left @ right / (a.double() * b.double()).sum()))
    mean, deviation = torch.tensor(ratios).mean(), torch.tensor(ratios).std()
    assert abs(mean - 1) < 4 * deviation / DRAWS**0.5
    assert deviation < 1.5 * (2 / SIZE) ** 0.5


@pytest.mark.parametrize("feature", FEATURES)
def test_the_fixed_signs_serve_every_kind_of_feature(feature):
    a = feature()
    b = a + 0.1 * feature()
    left, right = sketched(a, b)
    assert float(left @ right) == pytest.approx(float((a.double() * b.double()).sum()), rel=0.1)
    assert float((left - right).norm() / left.norm()) == pytest.approx(float((a - b).norm() / a.norm()), rel=0.1)


def test_large_features_use_the_signs_again():
    """Beyond ROWS * SIZE numbers the table repeats, rotated: equal parts must not add up to a larger product."""
    part = torch.randn(ROWS * SIZE)
    x = torch.cat([part, part, part, part[:1000]])
    y = torch.cat([part, -part, part, part[:1000]])
    left, right = sketched(x, y)
    assert float(left @ left) == pytest.approx(float(x.double() @ x.double()), rel=0.1)
    assert float(left @ right) == pytest.approx(float(x.double() @ y.double()), rel=0.3)


@pytest.mark.parametrize("size", [1, 100, SIZE, SIZE + 1, 30_000, ROWS * SIZE + 5000])
def test_exactly_linear(size):
    a, b = torch.randint(-50, 50, (2, size)).float()  # whole numbers, so that no sum is rounded
    left, right, both = sketched(a, b, 3 * a - 2 * b)
    assert torch.equal(both, 3 * left - 2 * right)


@pytest.mark.parametrize("size", [1, 77, SIZE - 1, SIZE])
def test_small_features_are_kept_as_they_are(size):
    values = torch.randn(2, 3, size)
    assert torch.equal(reference(values, values[0]), values)


@pytest.mark.parametrize("size", [SIZE + 1, 50_000, ROWS * SIZE + 1])
def test_the_size_of_a_sketch_does_not_grow(size):
    values = torch.randn(1, 2, size)
    assert reference(values, values[0]).shape == (1, 2, SIZE)
    assert coordinates(values, values[0]).shape == (1, 2, COORDINATES)


def test_samples_are_sketched_apart():
    values = torch.randn(2, 3, 40, 300)
    whole = reference(values, values[0])
    for sample in range(3):
        alone = values[:, sample : sample + 1]
        assert torch.equal(whole[:, sample : sample + 1], reference(alone, alone[0]))


def test_frames_folded_into_the_batch_belong_to_their_sample():
    like = torch.randn(2, 4)
    frames = torch.randn(1, 2 * 5, 40, 300)  # five frames of each of two samples
    assert torch.equal(reference(frames, like), reference(frames.view(1, 2, 5 * 40, 300), like))
    assert reference(torch.randn(1, 7, 1000), like).shape == (1, 1, SIZE)  # no multiple of two: one sample


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_is_summed_in_float32(dtype):
    values = torch.randn(1, 1, 20_000).to(dtype)
    for function in (reference, coordinates):
        result = function(values, values[0])
        assert result.dtype == torch.float32
        assert torch.equal(result, function(values.float(), values[0]))


def test_coordinates_are_numbers_of_the_feature():
    values = torch.arange(50_000.0)[None, None]
    chosen = coordinates(values, values[0])[0, 0]
    assert chosen.unique().numel() > 0.95 * COORDINATES
    assert torch.equal(chosen, chosen.round())
    assert abs(float(chosen.mean()) / 25_000 - 1) < 0.1  # from everywhere
    small = torch.randn(1, 1, 9)
    assert torch.equal(coordinates(small, small[0]), small)


SCRIPT = """
import hashlib, torch
from dcc.kernels.sketch import coordinates, reference
values = (torch.arange(2 * 30_000) % 97).float().view(1, 2, 30_000)
both = torch.cat([reference(values, values[0]), coordinates(values, values[0])], dim=-1)
print(hashlib.sha256(both.numpy().tobytes()).hexdigest())
"""


def test_the_same_in_every_process(tmp_path):
    values = (torch.arange(2 * 30_000) % 97).float().view(1, 2, 30_000)
    both = torch.cat([reference(values, values[0]), coordinates(values, values[0])], dim=-1)
    other = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256(both.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("size", [1, SIZE, SIZE + 1, 30_000, 70 * SIZE + 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_the_kernel_is_the_reference(device, size, dtype):
    values = torch.randn(1, 1, size, device=device).to(dtype)
    result, expected = launch(values, values[0]), reference(values, values[0])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)  # sums of many numbers, in another order
    assert result.dtype == torch.float32


def test_the_kernel_rotates_large_features(device):
    """Whole numbers, so that every order of summing gives the same sum: bit for bit."""
    values = torch.randint(-9, 10, (1, 1, ROWS * SIZE + 5000), device=device).float()
    assert torch.equal(launch(values, values[0]), reference(values, values[0]))


def test_the_kernel_sketches_samples_apart_and_takes_any_strides(device):
    values = torch.randint(-9, 10, (1, 3, 70, 129), device=device).float().transpose(2, 3)
    assert torch.equal(launch(values, values[0]), reference(values, values[0]))
    frames = values[:1].reshape(1, 3, -1).repeat(1, 2, 1)  # three frames of each of two samples
    like = torch.zeros(2, 1, device=device)
    assert torch.equal(launch(frames, like), reference(frames, like))


@pytest.mark.parametrize("size", [77, SIZE + 901])
def test_the_op(opcheck, size):
    values = torch.randn(2, 3, size)
    opcheck(op, values, values[0])
    assert torch.equal(op(values, values[0]), reference(values, values[0]))


@pytest.mark.gpu
def test_bandwidth(bandwidth):
    values = torch.randn(1, 1, 4608, 3072, device="cuda", dtype=torch.bfloat16)
    assert bandwidth(lambda: launch(values, values[0]), values.nbytes) > 0
