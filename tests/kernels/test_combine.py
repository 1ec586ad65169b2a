"""The reference of the forecast combine against a loop in float64."""

import pytest
import torch

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
