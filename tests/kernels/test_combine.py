"""The reference of the forecast combine against a loop in float64."""

import pytest
import torch

from dcc.errors import KernelError
from dcc.kernels import combine


def loop(coefficients, group, anchors, per_sample):
    """The sum in float64, sample by sample and anchor by anchor."""
    result = torch.zeros(anchors[0].shape, dtype=torch.float64)
    for sample in range(result.shape[0]):
        for age, anchor in enumerate(anchors):
            result[sample] += coefficients[group, sample if per_sample else 0, age].double() * anchor[sample].double()
    return result


SHAPES = [(1, 1), (3, 5), (2, 7, 13), (5, 3, 2, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_agrees_with_a_float64_loop(shape, count, dtype):
    anchors = [torch.randn(shape).to(dtype) for _ in range(count)]
    coefficients = torch.randn(2, shape[0], count)
    result = combine.reference(coefficients, 1, anchors, True)
    assert result.dtype == dtype
    torch.testing.assert_close(
        result, loop(coefficients, 1, anchors, True).to(dtype), rtol=torch.finfo(dtype).eps, atol=4e-6
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_the_batch_the_first_sample_serves_all(shape):
    anchors = [torch.randn(shape), torch.randn(shape)]
    coefficients = torch.randn(1, 4, 2)  # four samples, whatever the anchors' first dimension is
    result = combine.reference(coefficients, 0, anchors, False)
    torch.testing.assert_close(result, loop(coefficients, 0, anchors, False).float())


def test_per_sample_rows_differ():
    anchor = torch.ones(3, 2)
    result = combine.reference(torch.tensor([[[1.0], [2.0], [-3.0]]]), 0, [anchor], True)
    assert result.tolist() == [[1, 1], [2, 2], [-3, -3]]


def test_group_selects_the_row():
    coefficients = torch.tensor([[[1.0]], [[5.0]]])
    assert combine.reference(coefficients, 1, [torch.ones(1, 1)], True).item() == 5


def test_bfloat16_is_rounded_once_at_the_end():
    new, old = torch.tensor([[1.0078125]]).bfloat16(), torch.tensor([[1.0]]).bfloat16()
    coefficients = torch.tensor([[[100.5, -100.5]]])
    assert combine.reference(coefficients, 0, [new, old], True).item() == pytest.approx(100.5 * 0.0078125, rel=2**-8)
    products = new * coefficients[..., 0].bfloat16() + old * coefficients[..., 1].bfloat16()
    assert products.item() != pytest.approx(100.5 * 0.0078125, rel=2**-8)


def test_copy_is_exact():
    for dtype in (torch.float32, torch.bfloat16):
        anchors = [torch.randn(2, 3).to(dtype), torch.randn(2, 3).to(dtype)]
        result = combine.reference(torch.tensor([1.0, 0.0]).expand(1, 2, 2), 0, anchors, True)
        assert torch.equal(result, anchors[0])


def test_anchors_keep_their_values():
    anchors = [torch.ones(2, 3), torch.ones(2, 3)]
    combine.reference(torch.full((1, 2, 2), 3.0), 0, anchors, True)
    assert all(torch.equal(anchor, torch.ones(2, 3)) for anchor in anchors)


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 4), (2, 4, 3, 5), (2, 4, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("per_sample", [True, False])
def test_every_channel_has_its_own_row(shape, per_sample):
    anchors = [torch.randn(shape), torch.randn(shape)]
    coefficients = torch.randn(5, shape[0], 2)
    of_channel = torch.tensor([2, 0, 1, 2])
    result = combine.by_channel(coefficients, 2, anchors, per_sample, of_channel)
    dim = combine.channel_dim(len(shape))
    for channel, cluster in enumerate(of_channel.tolist()):
        own = [anchor.select(dim, channel) for anchor in anchors]
        expected = loop(coefficients, 2 + cluster, own, per_sample).float()
        torch.testing.assert_close(result.select(dim, channel), expected)


def test_channels_of_one_cluster_are_a_plain_forecast():
    anchors = [torch.randn(2, 3, 4).bfloat16() for _ in range(3)]
    coefficients, all_in_one = torch.randn(2, 2, 3), torch.zeros(4, dtype=torch.int64)
    plain = combine.reference(coefficients, 1, anchors, True)
    assert torch.equal(combine.by_channel(coefficients, 1, anchors, True, all_in_one), plain)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNEL_SHAPES = [(1, 1, 5), (2, 7, 13), (3, 129, 24), (1, 1000, 3), (2, 33), (2, 5, 3, 7), (2, 3, 2, 5, 9)]


def gate_of(shape, batch, dtype):
    """A gate of each channel, and of `batch` samples."""
    one = [1] * len(shape)
    one[0], dim = batch, combine.channel_dim(len(shape))
    one[dim] = shape[dim]
    return torch.randn(one).to(dtype)


@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("count", [1, 4])
def test_the_kernel_is_the_reference(device, agree, shape, dtype, count):
    anchors = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    coefficients = torch.randn(3, shape[0], 4, device=device)  # room for more anchors than there are
    gate, residual = gate_of(shape, shape[0], dtype).to(device), torch.randn(shape, device=device).to(dtype)
    for per_sample in (True, False):
        for extras in ((None, None), (gate, None), (None, residual), (gate[:1], residual)):
            result = combine.launch(coefficients, 1, anchors, per_sample, None, *extras)
            agree(result, combine.reference(coefficients, 1, anchors, per_sample, *extras), exact=True)
            assert result.is_contiguous() and result.dtype == dtype


@pytest.mark.parametrize("shape", [(2, 129, 13), (2, 33), (2, 5, 3, 7), (2, 3, 2, 5, 9)], ids=str)
@pytest.mark.parametrize("per_sample", [True, False])
def test_the_kernel_takes_a_row_a_channel(device, agree, shape, per_sample):
    anchors = [torch.randn(shape, device=device).bfloat16() for _ in range(3)]
    coefficients = torch.randn(6, shape[0], 3, device=device)
    of_channel = torch.randint(0, 4, (shape[combine.channel_dim(len(shape))],), device=device)
    gate = gate_of(shape, shape[0], torch.float32).to(device)
    for extras in ((None, None), (gate, anchors[2])):
        result = combine.launch(coefficients, 2, anchors, per_sample, of_channel, *extras)
        agree(result, combine.by_channel(coefficients, 2, anchors, per_sample, of_channel, *extras), exact=True)


def test_the_kernel_takes_any_strides(device, agree):
    wide = torch.randn(2, 40, 7, 2, device=device)
    anchors = [wide[..., 0].transpose(1, 2), wide[:, :, :, 1].transpose(1, 2)]
    coefficients = torch.randn(2, 2, 2, device=device).transpose(1, 2)
    agree(combine.launch(coefficients, 0, anchors, True), combine.reference(coefficients, 0, anchors, True))


@pytest.mark.parametrize(
    ("shape", "last"), [((2, 6, 5, 4), torch.channels_last), ((2, 6, 3, 5, 4), torch.channels_last_3d)]
)
def test_channels_last_stay_so(device, agree, shape, last):
    anchors = [torch.randn(shape, device=device).to(memory_format=last) for _ in range(2)]
    anchors[1] = anchors[1].contiguous()  # one of them lies otherwise
    coefficients, gate = torch.randn(1, 2, 2, device=device), gate_of(shape, 2, torch.float32).to(device)
    for result in (
        combine.launch(coefficients, 0, anchors, True, None, gate, anchors[1]),
        combine.op(coefficients, 0, anchors, True, None, gate, anchors[1]),
    ):
        agree(result, combine.reference(coefficients, 0, anchors, True, gate, anchors[1]))
        assert result.is_contiguous(memory_format=last)


def test_the_kernel_copies_exactly(device):
    anchors = [torch.randn(2, 7, 5, device=device).bfloat16() for _ in range(2)]
    assert torch.equal(
        combine.launch(torch.tensor([1.0, 0.0], device=device).expand(1, 2, 2), 0, anchors, True), anchors[0]
    )


def test_the_kernel_refuses_what_does_not_fit():
    a, c = torch.randn(2, 5, 3), torch.randn(1, 2, 4)
    for arguments in (
        (c, 0, [a] * 5, True),
        (torch.randn(1, 2, 9), 0, [a] * 9, True),
        (c, 0, [a, a[:, :4]], True),
        (c[:, :1], 0, [a], True),
        (c, 0, [a], True, torch.zeros(2, dtype=torch.int64)),
        (c, 0, [a], True, None, torch.randn(2, 5, 1)),
        (c, 0, [a], True, None, None, a[:1]),
    ):
        with pytest.raises(KernelError, match=r"expected .*; got \["):
            combine.launch(*arguments)


@pytest.mark.parametrize("shape", [(2, 7, 13), (2, 5, 3, 4)], ids=str)
def test_the_op(opcheck, shape):
    anchors, coefficients = [torch.randn(shape), torch.randn(shape)], torch.randn(3, 2, 2)
    of_channel, gate = (
        torch.tensor([0, 1] * 6 + [0])[: shape[combine.channel_dim(len(shape))]],
        gate_of(shape, 2, torch.float32),
    )
    opcheck(combine.op, coefficients, 1, anchors, True)
    opcheck(combine.op, coefficients, 1, anchors, False, of_channel, gate, anchors[0])
    assert torch.equal(combine.op(coefficients, 1, anchors, True), combine.reference(coefficients, 1, anchors, True))
    if len(shape) == 4:
        opcheck(combine.op, coefficients, 1, [a.to(memory_format=torch.channels_last) for a in anchors], True)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3])
def test_bandwidth(bandwidth, count):
    anchors = [torch.randn(1, 4608, 3072, device="cuda", dtype=torch.bfloat16) for _ in range(count + 1)]
    gate, coefficients = torch.randn(1, 1, 3072, device="cuda"), torch.randn(1, 1, count, device="cuda")
    moved = (count + 2) * anchors[0].nbytes
    assert bandwidth(lambda: combine.launch(coefficients, 0, anchors[1:], True, None, gate, anchors[0]), moved) > 0
