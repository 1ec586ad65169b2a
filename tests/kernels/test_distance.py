"""distance: every norm by hand, per sample, in low precision, and against zeros."""

import pytest
import torch

from dcc.errors import KernelError
from dcc.kernels import distance
from dcc.kernels.distance import BLOCK, MOST_PIECES, NORMS, launch, op, reference

VALUE = torch.tensor([[1.0, -2.0], [4.0, 0.0]])
OTHER = torch.tensor([[2.0, -2.0], [1.0, 1.0]])


@pytest.mark.parametrize(
    ("norm", "expected"),
    [("l1", [0.5, 2.0]), ("mse", [0.5, 5.0]), ("rel_l1", [0.25, 2.0]), ("rel_l2", [(1 / 8) ** 0.5, 5**0.5])],
)
def test_by_hand(norm, expected):
    assert reference(VALUE, OTHER, norm, 2).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("norm", "expected"), [("l1", [1.5, 2.0]), ("mse", [2.5, 8.0]), ("rel_l1", [1, 1])])
def test_against_zeros(norm, expected):
    assert reference(VALUE, None, norm, 2).tolist() == pytest.approx(expected)


def test_samples_of_several_rows_and_equal_values():
    folded = torch.arange(24.0).reshape(6, 2, 2)  # two samples of three frames
    moved = folded + torch.tensor([1.0, 1, 1, 3, 3, 3]).reshape(6, 1, 1)
    assert reference(moved, folded, "l1", 2).tolist() == [1.0, 3.0]
    for norm in ("l1", "mse", "rel_l1", "rel_l2"):
        assert reference(folded, folded, norm, 2).tolist() == [0.0, 0.0]


def test_bfloat16_is_summed_in_float32():
    value = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert reference(value, value * 2, "l1", 1).item() == 1.0  # a bfloat16 sum would stop at 256
    assert reference(value, value * 0, "rel_l1", 1).isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 7, 13), (2, 129, 24), (2, 1000, 3), (2, 3, 5, 4), (6,)], ids=str)
def test_the_kernel_is_the_reference(device, agree, norm, dtype, shape):
    value, other = torch.randn(2, *shape, device=device).to(dtype)
    batch = max(shape[0] // 2, 1)  # samples of one row and of two
    for base in (other, None):
        agree(launch(value, base, norm, batch), reference(value, base, norm, batch))


def test_the_kernel_takes_any_strides(device, agree):
    value, other = torch.randn(2, 2, 6, 5, 4, device=device)
    for pair in (
        (value.transpose(1, 2), other.transpose(1, 2)),
        (value.to(memory_format=torch.channels_last), other),
        (value, other.to(memory_format=torch.channels_last)),
    ):
        agree(launch(*pair, "rel_l1", 2), reference(*pair, "rel_l1", 2))


@pytest.mark.parametrize("norm", ["rel_l1", "rel_l2"])
def test_the_kernel_against_nothing_is_finite(device, norm):
    value = torch.ones(2, 7, device=device)
    agree = torch.testing.assert_close
    agree(launch(value, value * 0, norm, 2), reference(value, value * 0, norm, 2))


def test_programs_of_several_rounds(device, agree, monkeypatch):
    """A sample of more than MOST_PIECES * BLOCK numbers; here, of more than three pieces."""
    monkeypatch.setattr(distance, "MOST_PIECES", 4)
    value, other = torch.randn(2, 2, 5 * BLOCK + 77, device=device)
    assert MOST_PIECES > 4
    agree(launch(value, other, "l1", 2), reference(value, other, "l1", 2))
    assert torch.equal(launch(value, other, "l1", 2), launch(value, other, "l1", 2))


def test_the_kernel_refuses_what_does_not_fit():
    value = torch.randn(4, 3)
    for arguments in ((value, value[:2], "l1", 2), (value, None, "l1", 3), (value, None, "l3", 2)):
        with pytest.raises(KernelError):
            launch(*arguments)


@pytest.mark.parametrize("norm", NORMS)
def test_the_op(opcheck, norm):
    value, other = torch.randn(2, 4, 7, 3)
    opcheck(op, value, other, norm, 2)
    opcheck(op, value, None, norm, 4)
    assert torch.equal(op(value, other, norm, 2), reference(value, other, norm, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["rel_l1"])
def test_bandwidth(bandwidth, norm):
    value, other = torch.randn(2, 1, 4608, 3072, device="cuda").bfloat16()
    assert bandwidth(lambda: launch(value, other, norm, 1), 2 * value.nbytes) > 0
