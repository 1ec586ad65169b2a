"""The gather kernel copies rows: every comparison is bit for bit."""

import pytest
import torch

from dcc.errors import KernelError
from dcc.kernels.gather_tokens import launch, op, reference

SHAPES = [(1, 1, 5), (2, 7, 13), (3, 129, 24), (1, 1000, 3), (2, 5, 1100), (2, 9), (2, 6, 3, 5)]


def chosen(samples, tokens, device):
    """About a third of the tokens of each sample, out of order."""
    score = torch.rand(samples, tokens, device=device)
    return score.topk(max(tokens // 3, 1), dim=1).indices


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_the_kernel_is_the_reference(device, shape, dtype):
    value = (100 * torch.randn(shape, device=device)).to(dtype)
    index = chosen(*shape[:2], device)
    result = launch(value, index)
    assert torch.equal(result, reference(value, index)) and result.dtype == dtype


def test_the_kernel_takes_any_strides_and_a_value_without_the_batch(device):
    value = torch.randn(3, 24, 17, device=device).transpose(1, 2)
    index = chosen(6, 17, device)[::2]
    assert torch.equal(launch(value, index), reference(value, index))
    assert torch.equal(launch(value[:1], index), reference(value[:1], index))


def test_the_kernel_refuses_what_does_not_fit():
    for index in (torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)):
        with pytest.raises(KernelError, match="an index of every sample"):
            launch(torch.randn(2, 5, 3), index)


@pytest.mark.parametrize("samples", [1, 2])
def test_the_op(opcheck, samples):
    value, index = torch.randn(samples, 7, 3), torch.tensor([[3, 1], [0, 6]])
    opcheck(op, value, index)
    assert torch.equal(op(value, index), reference(value, index))


@pytest.mark.gpu
def test_bandwidth(bandwidth):
    value = torch.randn(1, 4608, 3072, device="cuda", dtype=torch.bfloat16)
    index = chosen(1, 4608, "cuda").sort().values
    moved = 2 * index.shape[1] * 3072 * 2
    assert bandwidth(lambda: launch(value, index), moved) > 0
