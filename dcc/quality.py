"""How close samples are to reference samples: PSNR for any shape, SSIM for images and video."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 11  # pixels: the side of SSIM's window
CEILING = 100.0  # dB that an identical sample adds to a mean over samples that are not all identical


def psnr(samples: Tensor, reference: Tensor, data_range: float = 1.0) -> list[float]:
    """Peak signal-to-noise ratio of each sample in dB; infinite where it equals its reference.

    Both are float tensors of one shape [n, ...]; `data_range` is the distance from their lowest to their highest
    value. Raises ValueError for other shapes and types.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio  # two seconds that `import dcc` need not take

    _check_pair(samples, reference)
    dimensions = tuple(range(1, samples.dim()))
    return peak_signal_noise_ratio(samples, reference, data_range=data_range, dim=dimensions, reduction="none").tolist()


def ssim(samples: Tensor, reference: Tensor, data_range: float = 1.0) -> list[float]:
    """Structural similarity of each sample, 1 where it equals its reference; of a video, the mean over its frames.

    Shapes as `frames` takes them, ranges as in `psnr`. Raises ValueError for what is not images.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # imported here as in `psnr`

    _check_pair(samples, reference)
    ours, theirs = frames(samples), frames(reference)
    if ours is None or theirs is None:
        raise ValueError(f"samples {list(samples.shape)} are not images of at least {SMALLEST} x {SMALLEST} pixels")
    values = structural_similarity_index_measure(
        ours.flatten(0, 1), theirs.flatten(0, 1), data_range=data_range, reduction="none"
    )
    return torch.as_tensor(values).reshape(len(samples), -1).mean(dim=1).tolist()


def frames(samples: Tensor) -> Tensor | None:
    """Samples as [n, frames, channels, h, w]; None where their shape is not that of images or video.

    Images are [n, c, h, w] or [n, h, w, 3], videos [n, frames, c, h, w] or [n, frames, h, w, 3], with c 1 or 3.
    """
    if samples.dim() == 4:
        samples = samples[:, None]
    if samples.dim() != 5:
        return None
    if samples.shape[2] not in (1, 3) and samples.shape[-1] == 3:
        samples = samples.movedim(-1, 2)
    return samples if samples.shape[2] in (1, 3) and min(samples.shape[-2:]) >= SMALLEST else None


def are_images(reference: Tensor) -> bool:
    """Whether samples have the shape of images or video and values from -1 to 1, unlike latents."""
    return frames(reference) is not None and float(reference.abs().max()) <= 1


def spread(reference: Tensor) -> float:
    """The distance from the lowest to the highest value; 1 for a constant tensor."""
    return float(reference.max() - reference.min()) or 1.0


def mean_psnr(values: Sequence[float]) -> float:
    """Mean in dB. Infinite only where all are: beside others, an identical sample counts as 100 dB."""
    if all(math.isinf(value) for value in values):
        return math.inf
    return statistics.fmean(CEILING if math.isinf(value) else value for value in values)


def _check_pair(samples: Tensor, reference: Tensor) -> None:
    if samples.shape != reference.shape or samples.dim() < 2:
        raise ValueError(
            f"samples {list(samples.shape)} and reference {list(reference.shape)} must have one shape [n, ...]"
        )
    if not (samples.is_floating_point() and reference.is_floating_point()):
        raise ValueError(f"samples ({samples.dtype}) and reference ({reference.dtype}) must be float tensors")
