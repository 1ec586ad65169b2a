"""Token selection: which tokens of a forecast value are computed afresh, and what happens to them.

Only references exist: Inductor lowers them with what surrounds them. Every number of tokens follows from a ratio and
a shape, never from a value, so nothing waits for the device. Shapes: a value or its tokens [B, N, C], a score [B, N]
in float32 (the largest are chosen), an index [B, k] int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 10  # rounds of K-means: fixed, so that the graph is static


def count(ratio: float, tokens: int) -> int:
    """How many of `tokens` a ratio chooses: at least one, at most all."""
    return min(max(round(ratio * tokens), 1), tokens)


def top(score: Tensor, ratio: float) -> Tensor:
    """Index of the tokens with the largest scores, in the order of the tokens."""
    return score.topk(count(ratio, score.shape[1]), dim=1).indices.sort(dim=1).values


def gather(value: Tensor, index: Tensor) -> Tensor:
    """The chosen tokens [B, k, C...] of a value [B or 1, N, C...]."""
    return value.expand(index.shape[0], *value.shape[1:]).gather(1, _like(index, value))


def scatter(value: Tensor, index: Tensor, fresh: Tensor) -> Tensor:
    """`value` with the chosen tokens replaced by `fresh` [B, k, C...]."""
    return value.scatter(1, _like(index, value), fresh.to(value.dtype))


def _like(index: Tensor, value: Tensor) -> Tensor:
    """The index [B, k] for every number of a token: [B, k, C...]."""
    return index.view(*index.shape, *([1] * (value.dim() - 2))).expand(*index.shape, *value.shape[2:])


def norm_score(value: Tensor, sign: int) -> Tensor:
    """L2 norm of every token divided by the largest of its sample, in [0, 1]; one minus that where `sign` is -1."""
    norm = value.float().flatten(2).norm(dim=2)
    share = norm / norm.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return share if sign > 0 else 1 - share


def random_score(step: Tensor, value: Tensor, salt: int) -> Tensor:
    """Uniform numbers in [0, 1), the same for all samples: they follow from the step [1], the token and the salt."""
    tokens = torch.arange(value.shape[1], device=value.device, dtype=torch.int64)
    mixed = tokens * 0x9E3779B1 + step.to(torch.int64) * 0x85EBCA77 + (salt + 1) * 0xC2B2AE3D
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0x7FFFFFFF
    return (mixed.float() / 2**31).expand(value.shape[0], -1)


def ages(value: Tensor) -> Tensor:
    """Ages [B, N] float32 of the tokens of a value when none has waited yet: zeros."""
    return value.new_zeros(value.shape[:2], dtype=torch.float32)


def aged(score: Tensor, age: Tensor, weight: float) -> Tensor:
    """The score plus `weight` for every step that a token has gone without being computed; age [B, N] float32."""
    return score + weight * age


def older(age: Tensor, index: Tensor) -> Tensor:
    """The ages after a step that computed the chosen tokens."""
    return (age + 1).scatter(1, index, 0.0)


def cluster(tokens: Tensor, clusters: int) -> Tensor:
    """K-means labels [B, N] int64 of the tokens by L1 distance, from evenly spaced tokens as first centres."""
    points = tokens.float()
    first = torch.arange(clusters, device=tokens.device) * points.shape[1] // clusters
    centres = points.index_select(1, first)
    for _ in range(ITERATIONS):
        member = torch.nn.functional.one_hot(_nearest(points, centres), clusters).to(points.dtype)  # [B, N, K]
        sizes = member.sum(1)[..., None]
        means = member.transpose(1, 2) @ points / sizes.clamp_min(1)
        centres = torch.where(sizes > 0, means, centres)
    return _nearest(points, centres)


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(points, centres, p=1).argmin(2)


def one_a_cluster(score: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Index [B, K] of the token with the largest score in each cluster; an empty cluster gets the best token of all."""
    member = labels[:, None] == torch.arange(clusters, device=labels.device)[:, None]  # [B, K, N]
    return (score[:, None] + member).argmax(2)  # scores are in [0, 1): a member beats every other token


def spread(value: Tensor, labels: Tensor, fresh: Tensor, share: float) -> Tensor:
    """`value` drawn by `share` towards the fresh token [B, K, C] of each token's cluster."""
    return torch.lerp(value, gather(fresh.to(value.dtype), labels), share)


def noise_score(output: Tensor, drops: Tensor, starvation: float, sign: int) -> Tensor:
    """`sign` times the standard deviation over the channels of each token, weighed by how often it was dropped.

    The weight is exp(sign * starvation * drops): whatever the sign, a token that was dropped often comes up again.
    """
    return sign * output.float().std(dim=2) * torch.exp(sign * starvation * drops)


def dropped(drops: Tensor, index: Tensor) -> Tensor:
    """How often each token was not chosen [B, N] float32, after a step that chose these."""
    return (drops + 1).scatter(1, index, drops.gather(1, index))


def joined(index: Tensor, score: Tensor, joint: Tensor, last: bool) -> Tensor:
    """The index for a value [B, M, C] whose last (else first) N tokens are those of `score`; all others are chosen too.

    The result is [B, k + M - N].
    """
    tokens, total = score.shape[1], joint.shape[1]
    before = total - tokens if last else 0
    head = torch.arange(before, device=index.device)
    tail = torch.arange(before + tokens, total, device=index.device)
    rest = torch.cat([head, tail]).expand(index.shape[0], -1)
    return torch.cat([rest, index + before], dim=1).sort(dim=1).values
