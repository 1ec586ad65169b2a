"""Selectors of tokens against what their words say, in loops."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dcc.kernels import select_tokens as tokens


@pytest.mark.parametrize(
    ("ratio", "total", "expected"), [(0.5, 8, 4), (0.3, 7, 2), (0.01, 7, 1), (1.0, 7, 7), (1.8, 7, 7)]
)
def test_count(ratio, total, expected):
    assert tokens.count(ratio, total) == expected


def test_top_gives_the_largest_scores_in_the_order_of_the_tokens():
    score = torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.2], [5.0, 1.0, 4.0, 2.0, 3.0]])
    assert tokens.top(score, 0.6).tolist() == [[1, 2, 3], [0, 2, 4]]
    assert tokens.top(score, 1.0).tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5), (3, 7, 2, 4)], ids=str)
def test_gather_and_scatter_touch_the_chosen_tokens_only(shape):
    value = torch.randn(shape)
    index = torch.stack([torch.randperm(shape[1])[:2] for _ in range(shape[0])])
    taken = tokens.gather(value, index)
    result = tokens.scatter(value, index, -taken)
    for sample in range(shape[0]):
        for token in range(shape[1]):
            sign = -1 if token in index[sample] else 1
            assert torch.equal(result[sample, token], sign * value[sample, token])


def test_gather_from_a_value_without_the_batch():
    table = torch.randn(1, 5, 3)
    index = torch.tensor([[0, 4], [2, 2]])
    assert torch.equal(tokens.gather(table, index)[1, 0], table[0, 2])


def test_scatter_keeps_the_dtype():
    result = tokens.scatter(torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.tensor([[1]]), torch.ones(1, 1, 3))
    assert result.dtype == torch.bfloat16


def test_norm_score():
    value = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]]])
    torch.testing.assert_close(tokens.norm_score(value, 1), torch.tensor([[1.0, 0.2, 0.0]]))
    torch.testing.assert_close(tokens.norm_score(value, -1), torch.tensor([[0.0, 0.8, 1.0]]))
    assert tokens.norm_score(torch.zeros(1, 2, 3), 1).tolist() == [[0.0, 0.0]]


def test_random_score_follows_from_step_token_and_salt_alone():
    value = torch.randn(3, 500, 2)

    def score(step, salt):
        return tokens.random_score(torch.tensor([step]), value, salt)

    first = score(4, 0)
    assert torch.equal(first, tokens.random_score(torch.tensor([4]), value * 2, 0))
    assert torch.equal(first[0], first[2])  # guided halves of a batch choose alike
    assert first.min() >= 0 and first.max() < 1
    assert abs(first.mean() - 0.5) < 0.05 and abs(first.std() - 12**-0.5) < 0.03
    for other in (score(5, 0), score(4, 1)):
        assert abs(torch.corrcoef(torch.stack([first[0], other[0]]))[0, 1]) < 0.15


def test_every_token_comes_up_at_random():
    seen = set()
    for step in range(40):
        score = tokens.random_score(torch.tensor([step]), torch.empty(1, 16, 1), 0)
        seen.update(tokens.top(score, 0.25)[0].tolist())
    assert seen == set(range(16))


def test_waiting_tokens_come_up():
    score, age = torch.tensor([[1.0, 0.9, 0.5]]), tokens.ages(torch.empty(1, 3, 2))
    chosen = []
    for _ in range(9):
        index = tokens.top(tokens.aged(score, age, 0.25), 1 / 3)
        age = tokens.older(age, index)
        chosen.append(index.item())
    assert chosen[:2] == [0, 1] and set(chosen) == {0, 1, 2}
    assert age[0, chosen[-1]] == 0
    assert {tokens.top(tokens.aged(score, age * 0, 0.25), 1 / 3).item()} == {0}


def test_cluster_separates_what_is_apart():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    owner = torch.tensor([0, 1, 1, 1, 0, 2, 2, 2, 0])  # tokens 0, 3 and 6 start
    labels = tokens.cluster((centres[owner] + 0.1 * torch.randn(9, 2))[None], 3)[0]
    assert labels.dtype == torch.int64
    assert all((labels[i] == labels[j]) == (owner[i] == owner[j]) for i in range(9) for j in range(9))


def test_one_a_cluster_takes_the_best_of_each():
    score = torch.tensor([[0.1, 0.7, 0.6, 0.3]])
    labels = torch.tensor([[0, 1, 1, 0]])
    assert tokens.one_a_cluster(score, labels, 2).tolist() == [[3, 1]]
    assert tokens.one_a_cluster(score, labels, 3).tolist() == [[3, 1, 1]]  # an empty cluster: the best of all


def test_spread_draws_a_cluster_to_its_fresh_token():
    value, labels = torch.zeros(1, 3, 2), torch.tensor([[1, 0, 1]])
    fresh = torch.tensor([[[1.0, 2.0], [10.0, 20.0]]])
    torch.testing.assert_close(
        tokens.spread(value, labels, fresh, 0.1), torch.tensor([[[1.0, 2.0], [0.1, 0.2], [1.0, 2.0]]])
    )
    assert torch.equal(tokens.spread(value, labels, fresh, 0.0), value)


@pytest.mark.parametrize("sign", [1, -1])
def test_noise_score_brings_dropped_tokens_back(sign):
    output = torch.randn(1, 6, 4) * torch.arange(1, 7)[:, None]
    best = tokens.noise_score(output, torch.zeros(1, 6), 0.1, sign).argmax()
    deviations = output.std(2)[0]
    assert deviations[best] == (deviations.max() if sign > 0 else deviations.min())
    drops, seen = torch.zeros(1, 6), set()
    for _ in range(60):
        index = tokens.top(tokens.noise_score(output, drops, 0.1, sign), 1 / 3)
        drops = tokens.dropped(drops, index)
        seen.update(index[0].tolist())
    assert seen == set(range(6))
    assert drops.sum() == 60 * 4


@pytest.mark.parametrize(("last", "expected"), [(True, [0, 1, 2, 4, 6]), (False, [1, 3, 4, 5, 6])])
def test_joined_takes_all_other_tokens(last, expected):
    index, score, joint = torch.tensor([[1, 3]]), torch.empty(1, 4), torch.empty(1, 7, 2)
    assert tokens.joined(index, score, joint, last).tolist() == [expected]


def test_everything_can_be_traced_for_a_compiler():
    """Nothing looks at a value on the host: tracing on fake tensors would raise."""

    def chosen(value, step, drops):
        labels = tokens.cluster(value, 3)
        score = tokens.aged(tokens.norm_score(value, -1), drops, 0.1) + tokens.random_score(step, value, 2)
        index = tokens.top(score, 0.5)
        few = tokens.one_a_cluster(tokens.random_score(step, value, 0), labels, 3)
        drawn = tokens.spread(value, labels, tokens.gather(value, few), 0.1)
        noise = tokens.noise_score(value, tokens.dropped(drops, index), 0.1, 1)
        wide = tokens.joined(index, noise, torch.cat([value, value], 1), True)
        return tokens.scatter(drawn, index, tokens.gather(value, index)), tokens.older(drops, index), wide

    arguments = (torch.randn(2, 9, 4), torch.tensor([3]), torch.rand(2, 9))
    traced = make_fx(chosen, tracing_mode="fake")(*arguments)
    for ours, reference in zip(traced(*arguments), chosen(*arguments), strict=True):
        torch.testing.assert_close(ours, reference)
