"""Clusters of channels and their solvers: descriptors, K-means and errors by hand."""

import pytest
import torch

from dcc.plans.predictors import Predictor
from dcc.policies.channel_clusters import by_points, choose, descriptors, errors, k_means, next_step_errors

COPY, LINE, WIDE = Predictor("copy"), Predictor("taylor", 1), Predictor("foca", 2)
STEPS = 12


def lines_and_noise():
    """[steps, points, channels]: channels 0 to 3 are lines of their own, 4 to 7 jump to and fro."""
    slopes = torch.rand(1, 5, 4) + 1
    lines = torch.arange(STEPS)[:, None, None] * slopes + torch.randn(1, 5, 4)
    return torch.cat([lines, torch.randn(STEPS, 5, 4)], dim=2)


@pytest.mark.parametrize("shape", [(4, 2, 6, 3), (4, 2, 3, 5, 6), (4, 2, 3, 2, 5, 6), (4, 2, 3)], ids=str)
def test_points_are_all_but_steps_and_channels(shape):
    values = torch.randn(shape)
    points = by_points(values)
    assert points.shape == (4, values.numel() // 12, 3)
    channel = values[:, :, :, 1] if len(shape) == 4 else values[:, :, 1]
    assert torch.equal(points[:, :, 1], channel.reshape(4, -1))


def test_descriptors_are_standardised_and_tell_channels_apart():
    values = lines_and_noise()
    found = descriptors(values)
    assert found.shape == (8, 6)
    torch.testing.assert_close(found.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(0, correction=0), torch.ones(6))
    assert (found[:4, 4] < 0).all() and (found[4:, 4] > 0).all()  # lines do not bend
    assert (found[:4, 5] < 0).all() and (found[4:, 5] > 0).all()  # noise is flatter
    assert found[:4, 0].mean() > found[4:, 0].mean()  # lines grow


def test_channels_that_are_alike_or_nought_have_finite_descriptors():
    assert torch.equal(descriptors(torch.zeros(STEPS, 5, 3)), torch.zeros(3, 6))
    assert descriptors(torch.ones(STEPS, 5, 3) * torch.tensor([0.0, 1.0, 1e10])).isfinite().all()


def test_k_means_finds_what_stands_apart():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    truth = torch.arange(30) % 3
    labels = k_means(centres[truth] + torch.randn(30, 2), 3)
    assert len({(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}) == 3
    assert sorted(labels.unique().tolist()) == [0, 1, 2]


def test_k_means_is_the_same_at_every_call_and_leaves_no_cluster_empty():
    points = torch.randn(40, 6)
    assert torch.equal(k_means(points, 5), k_means(points, 5))
    assert k_means(torch.ones(7, 2), 4).tolist() == [0] * 7  # nothing tells them apart
    assert sorted(k_means(torch.randn(3, 2), 8).tolist()) == [0, 1, 2]  # as many as there are points


def test_errors_are_those_of_the_forecasts_that_a_mask_makes():
    values, mask = lines_and_noise(), [1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0]
    found = errors(values, [COPY, LINE], mask)
    assert found[1, :4].max() < 1e-8 < found[0, :4].min()
    expected = [
        (values[s] - values[max(a for a in range(s) if mask[a])]).square().mean(0) for s in range(STEPS) if not mask[s]
    ]
    torch.testing.assert_close(found[0], torch.stack(expected).mean(0))
    assert torch.equal(errors(values, [COPY], [1] * STEPS), torch.zeros(1, 8))


def test_next_step_errors_forecast_each_step_from_those_before_it():
    values = lines_and_noise()
    found = next_step_errors(values, [COPY, LINE, WIDE])
    copied = (values[3:] - values[2:-1]).square().mean((0, 1))
    wide = values[3:] - (2.5 * values[2:-1] - 2 * values[1:-2] + 0.5 * values[:-3])
    torch.testing.assert_close(found[0], copied)
    torch.testing.assert_close(found[2], wide.square().mean((0, 1)), atol=1e-6, rtol=1e-4)
    assert found[1, :4].max() < 1e-8


def test_each_cluster_takes_its_best_solver_and_equal_choices_are_one():
    labels = torch.tensor([0, 1, 2, 1])
    error = torch.tensor([[1.0, 0.0, 9.0, 3.0], [2.0, 9.0, 0.0, 9.0], [9.0, 1.0, 9.0, 1.0]])
    # cluster 0: solver 0; cluster 1: means 1.5, 9, 1 -> solver 2; cluster 2: solver 1
    assert choose(labels, error) == ([0, 2, 1, 2], [0, 1, 2])
    assert choose(labels, error[[0, 2]]) == ([0, 1, 0, 1], [0, 1])
    assert choose(torch.zeros(4, dtype=torch.int64), error) == ([0] * 4, [0])  # means 3.25, 5, 5
