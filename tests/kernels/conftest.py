"""Where kernels run, fresh memory full of NaN, and what a kernel reaches of the bandwidth of a copy."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The GPU, or the CPU with Triton's interpreter; what launchers allocate there is NaN until it is written."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1")
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        memory = empty(*args, **kwargs)
        return memory.fill_(float("nan") if memory.is_floating_point() else -99)

    monkeypatch.setattr(torch, "empty", poisoned)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def agree() -> Callable[..., None]:
    """agree(result, expected): alike in shape and dtype, and to the rounding of their dtype in value.

    With `exact`, bit for bit, but in bfloat16: the interpreter cuts off its last bits, which a GPU rounds.
    """

    def check(result: Tensor, expected: Tensor, exact: bool = False) -> None:
        eps = max(torch.finfo(expected.dtype).eps, 1e-6)
        exact = exact and expected.dtype != torch.bfloat16
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1.5 * eps, "atol": 1e-5}
        torch.testing.assert_close(result, expected, **tolerance)

    return check


@pytest.fixture
def opcheck() -> Callable[..., None]:
    """opcheck(op, *arguments): the op keeps what its schema and its fake implementation say."""

    def check(op: Any, *arguments: Any) -> None:
        torch.library.opcheck(op, arguments)

    return check


@pytest.fixture
def bandwidth(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Callable[..., float]:
    """bandwidth(run, moved): prints and returns the share of the bandwidth of a copy at which `moved` bytes passed.

    Medians, with a cold cache.
    """
    testing = pytest.importorskip("triton.testing")

    def measure(run: Callable[[], object], moved: int) -> float:
        source, target = torch.empty(2, 2**28, dtype=torch.uint8, device="cuda")
        copy = 2 * source.nbytes / testing.do_bench(lambda: target.copy_(source), return_mode="median")
        share = moved / testing.do_bench(run, return_mode="median") / copy
        with capsys.disabled():
            print(f"\n{request.node.name}: {share:.0%} of the bandwidth of a copy, {copy / 1e6:.0f} GB/s")
        return share

    return measure
