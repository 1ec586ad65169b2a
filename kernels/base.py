"""What the kernels share: Triton where it is installed, and the memory order that they run over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dcc.errors import KernelError

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: ops run their references
    triton = tl = None

OPTIONS = {
    "enable_fp_fusion": False
}  # for every launch: products are rounded before they are added, as in the references
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def jit(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """`triton.jit` with these options; without Triton, a stand-in that raises KernelError at a launch."""
    return triton.jit(**options) if triton is not None else _Unavailable


class _Unavailable:
    def __init__(self, function: Callable[..., None]) -> None:
        self.fn = function

    def __getitem__(self, grid: object) -> Callable[..., None]:
        raise KernelError(f"{self.fn.__module__}: Triton is not installed; call the op, which then runs its reference")


def runs_on(value: Tensor) -> bool:
    """Whether an op runs its kernel on this tensor; it runs its reference otherwise."""
    return triton is not None and value.is_cuda


def run_kernel(kernel: Any, grid: tuple[int, ...], out: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launches a kernel whose first argument is `out`, on the device of `out`."""
    with torch.cuda.device_of(out):  # does nothing for a tensor on the CPU
        kernel[grid](out, *arguments, **constants, **OPTIONS)


def power_of_2(number: int, most: int) -> int:
    """The least power of two that is not less than `number`, but at most `most`."""
    return min(1 << max(number - 1, 0).bit_length(), most)


def memory_format(value: Tensor) -> torch.memory_format:
    """Channels last for images and videos that lie so in memory, else contiguous: the format of every op's result."""
    last = CHANNELS_LAST.get(value.dim())
    if last is None or value.is_contiguous() or not value.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def in_order(values: Sequence[Tensor]) -> list[Tensor]:
    """The values [batch, ...] of one shape, contiguous in the memory order of the first.

    Where that is channels last, the channels become the last dimension. Copies only values that lie otherwise in
    memory. Raises KernelError where shapes differ.
    """
    check(all(value.shape == values[0].shape for value in values), "one shape", *values)
    if memory_format(values[0]) is not torch.contiguous_format:
        values = [value.movedim(1, -1) for value in values]
    return [value.contiguous() for value in values]


def check(holds: bool, wanted: str, *values: Tensor) -> None:
    """Raises KernelError, with the shapes of `values`, unless `holds`."""
    if not holds:
        raise KernelError(f"expected {wanted}; got {', '.join(str(list(value.shape)) for value in values)}")
