"""How the calls of a run follow each other: which sample came from which answer, and how far samples move.

A sampler may call the denoiser several times at one noise level: for the branches of guidance, for tiles or windows,
or again for the same sample, as Heun's method does. Which it is shows in the samples: a sample is near the one that it
came from, and far from those of other chains.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SKETCHED = 1024  # elements of a sample by which it is known again
MOST_WAYS = 64  # calls at one noise level that are told apart where nothing but their order does


@functools.lru_cache(maxsize=64)
def _places(size: int, device: torch.device) -> Tensor:
    places = torch.randint(size, (SKETCHED,), generator=torch.Generator().manual_seed(size))
    return places.sort().values.to(device)


def sketch(sample: Tensor) -> Tensor:
    """The same at most 1,024 elements of every sample of a batch, [batch, elements], in its own dtype."""
    rows = sample.detach().flatten(1) if sample.dim() > 1 else sample.detach()[:, None]
    return rows.clone() if rows.shape[1] <= SKETCHED else rows.index_select(1, _places(rows.shape[1], rows.device))


def moved(before: Tensor, now: Tensor) -> Tensor:
    """How far samples moved between two sketches, [batch] float32, as a share of the larger of their norms.

    About 0 where nothing moved; between 1 and 1.41 for samples that have nothing to do with each other.
    """
    before, now = before.float(), now.float()
    size = torch.maximum(before.norm(dim=1), now.norm(dim=1)).clamp_min(1e-12)
    return (now - before).norm(dim=1) / size


@dataclass(frozen=True)
class Seen:
    """One call of a recorded run: its noise level, what could tell its stream from others, and its sample.

    `sample` is equal for equal samples; `sketched` is on the CPU, and None where the denoiser takes no sample.
    """

    level: Hashable
    key: Hashable
    sample: Hashable = None
    sketched: Tensor | None = None


def steps_of(levels: Sequence[Hashable]) -> list[int]:
    """By call, the number of its step: calls that follow each other at one noise level belong to one step."""
    return list(itertools.accumulate((a != b for a, b in itertools.pairwise(levels)), initial=0))[: len(levels)]


def chains(calls: Sequence[Seen]) -> list[list[int]]:
    """The calls of each chain in order; chains in the order of their first calls."""
    steps = steps_of([call.level for call in calls])
    by_key: dict[Hashable, list[int]] = {}
    for index, call in enumerate(calls):
        by_key.setdefault(call.key, []).append(index)
    found = []
    for members in by_key.values():
        own = [steps[i] for i in members]
        found += _split(members, own, _ways([calls[i] for i in members], own))
    return sorted(found)


def positions(calls: Sequence[Seen], found: Sequence[Sequence[int]]) -> list[int]:
    """By call, its position in the run: its step, with steps that evaluate a chain again and again counted apart.

    `found` are the chains of these calls.
    """
    steps = steps_of([call.level for call in calls])
    again = [0] * len(calls)  # by call, how often its chain was called at this step before
    for chain in found:
        for index, ordinal in zip(chain, _ordinals([steps[i] for i in chain]), strict=True):
            again[index] = ordinal
    most = [0] * (max(steps, default=-1) + 1)
    for step, count in zip(steps, again, strict=True):
        most[step] = max(most[step], count)
    begins = [0, *itertools.accumulate(count + 1 for count in most)]
    return [begins[step] + count for step, count in zip(steps, again, strict=True)]


def _ordinals(steps: Sequence[int]) -> list[int]:
    """By call, how many calls of its step came before it."""
    return [index - steps.index(step) for index, step in enumerate(steps)]


def _split(members: Sequence[int], steps: Sequence[int], ways: int) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for index, ordinal in zip(members, _ordinals(steps), strict=True):
        found.setdefault(ordinal % ways, []).append(index)
    return list(found.values())


def _ways(calls: Sequence[Seen], steps: Sequence[int]) -> int:
    """How many chains take turns in calls that nothing else tells apart: as many as move their samples least."""
    most = max(_ordinals(steps), default=0) + 1
    if most == 1:
        return 1
    costs = {ways: _distance(calls, steps, ways) for ways in range(1, min(most, MOST_WAYS) + 1)}
    best = min(costs, key=lambda ways: costs[ways])
    return best if math.isfinite(costs[best]) else most


def _distance(calls: Sequence[Seen], steps: Sequence[int], ways: int) -> float:
    """The mean move of a sample between two calls of a chain; the same sample again at its level is another chain's."""
    found = []
    for chain in _split(range(len(calls)), steps, ways):
        for a, b in itertools.pairwise(chain):
            if steps[a] == steps[b] and calls[a].sample == calls[b].sample:
                return math.inf
            found.append(_apart(calls[a], calls[b]))
    return sum(found) / len(found) if found else math.inf


def _apart(a: Seen, b: Seen) -> float:
    if a.sketched is None or b.sketched is None or a.sketched.shape != b.sketched.shape:
        return math.inf
    return float(moved(a.sketched, b.sketched).max())


def moves(calls: Sequence[Seen], found: Sequence[Sequence[int]], places: Sequence[int]) -> Tensor:
    """How far a chain's sample moves from one position to another, [positions, positions] float64, symmetric.

    The largest over all chains `found` and samples; where no chain has both positions, what the moves between them add
    up to, infinity where that is unknown too.
    """
    count = max(places, default=-1) + 1
    table = torch.full((count, count), -1.0, dtype=torch.float64)
    for chain in found:
        sketches = [sketched for index in chain if (sketched := calls[index].sketched) is not None]
        if len(sketches) < len(chain) or any(own.shape != sketches[0].shape for own in sketches):
            continue
        stacked = torch.stack(sketches, dim=1).double()  # [batch, calls, elements]
        norms = stacked.norm(dim=2)
        size = torch.maximum(norms[:, :, None], norms[:, None]).clamp_min(1e-12)
        far = (torch.cdist(stacked, stacked) / size).amax(dim=0)
        at = torch.tensor([places[index] for index in chain])
        table[at[:, None], at] = torch.maximum(table[at[:, None], at], far)
    table.fill_diagonal_(0.0)
    near = torch.where(table.diagonal(1) < 0, math.inf, table.diagonal(1))
    for a, b in (table < 0).nonzero().tolist():
        table[a, b] = near[min(a, b) : max(a, b)].sum()
    return table
