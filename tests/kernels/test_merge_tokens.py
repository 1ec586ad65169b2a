"""Fresh rows are copied, stale rows are forecast, and each forecast is that of combine."""

import pytest
import torch

from dcc.errors import KernelError
from dcc.kernels import combine
from dcc.kernels.merge_tokens import launch, op, reference

SHAPES = [(1, 1, 5), (2, 7, 13), (1, 129, 24), (2, 5, 1100), (2, 9), (2, 6, 3, 5)]


def example(shape, count, dtype, device="cpu"):
    """Coefficients, anchors, an index of about a third of the tokens, and their fresh rows."""
    anchors = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    index = torch.rand(shape[:2], device=device).topk(max(shape[1] // 3, 1), dim=1).indices
    fresh = torch.randn(*index.shape, *shape[2:], device=device).to(dtype)
    return torch.randn(2, shape[0], 4, device=device), anchors, index, fresh


def test_the_reference_by_hand():
    coefficients, anchor = torch.tensor([[[3.0]], [[2.0]]]), torch.tensor([[[1.0], [2.0], [3.0]]])
    result = reference(coefficients, 1, [anchor], True, torch.tensor([[1]]), torch.tensor([[[9.0]]]))
    assert result.flatten().tolist() == [2, 9, 6]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_kernel_is_the_reference(device, agree, shape, dtype, count):
    coefficients, anchors, index, fresh = example(shape, count, dtype, device)
    for per_sample in (True, False):
        if not per_sample:
            coefficients = coefficients[:, :1]
        result = launch(coefficients, 1, anchors, per_sample, index, fresh)
        agree(result, reference(coefficients, 1, anchors, per_sample, index, fresh), exact=True)


def test_a_thousand_tokens(device, agree):
    coefficients, anchors, index, fresh = example((1, 1000, 3), 2, torch.bfloat16, device)
    arguments = (coefficients, 0, anchors, True, index, fresh)
    agree(launch(*arguments), reference(*arguments))


def test_the_kernel_takes_any_strides_and_casts_fresh_rows(device, agree):
    coefficients, anchors, index, fresh = example((2, 12, 17), 2, torch.bfloat16, device)
    anchors = [anchor.transpose(1, 2).contiguous().transpose(1, 2) for anchor in anchors]
    arguments = (coefficients, 0, anchors, True, index.flip(1), fresh.float())
    agree(launch(*arguments), reference(*arguments))


def test_a_token_may_be_named_twice(device):
    coefficients, anchors, _, _ = example((1, 5, 3), 1, torch.float32, device)
    index, row = torch.tensor([[2, 4, 2]], device=device), torch.randn(1, 1, 3, device=device)
    result = launch(coefficients, 0, anchors, True, index, row.expand(1, 3, 3))
    assert torch.equal(result, reference(coefficients, 0, anchors, True, index, row.expand(1, 3, 3)))


def test_without_chosen_tokens_it_is_combine(device, agree):
    coefficients, anchors, index, fresh = example((2, 7, 5), 2, torch.float32, device)
    result = launch(coefficients, 0, anchors, True, index[:, :0], fresh[:, :0])
    agree(result, combine.reference(coefficients, 0, anchors, True))


def test_the_kernel_refuses_what_does_not_fit():
    coefficients, anchors, index, fresh = example((2, 7, 5), 2, torch.float32)
    for arguments in (
        (coefficients, 0, [], True, index, fresh),
        (coefficients, 0, [anchors[0], anchors[1][:, :6]], True, index, fresh),
        (coefficients, 0, anchors * 4, True, index, fresh),
        (coefficients[:, :1], 0, anchors, True, index, fresh),
        (coefficients, 0, anchors, True, index[:1], fresh),
        (coefficients, 0, anchors, True, index, fresh[:, :1]),
    ):
        with pytest.raises(KernelError, match="expected"):
            launch(*arguments)


def test_the_op(opcheck):
    coefficients, anchors, index, fresh = example((2, 7, 5), 2, torch.bfloat16)
    arguments = (coefficients, 1, anchors, True, index, fresh)
    opcheck(op, *arguments)
    assert torch.equal(op(*arguments), reference(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3])
def test_bandwidth(bandwidth, count):
    coefficients, anchors, index, fresh = example((1, 4608, 3072), count, torch.bfloat16, "cuda")
    stale = anchors[0].nbytes - fresh.nbytes
    moved = anchors[0].nbytes + fresh.nbytes + count * stale
    assert bandwidth(lambda: launch(coefficients, 0, anchors, True, index, fresh), moved) > 0
