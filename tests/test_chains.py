"""What a recorded run shows of its calls: steps, repeated evaluations, and which calls follow each other.

The loops say themselves which chain each call belongs to; the recording is told nothing of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcc.record.chains import chains
from dcc.record.recorder import Recorder
from dcc.record.seam import installed

LEVELS = [1000.0 - 90 * step for step in range(10)]
REPEATED = [LEVELS[0], *(level for level in LEVELS[1:] for _ in range(2))]


class Net(nn.Module):
    """Four residual blocks with a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.prompt = nn.Linear(4, 16), nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.leave = nn.Linear(16, 4)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, skip: tuple[int, ...] = ()) -> Tensor:
        h, text = self.enter(x) + (t / 1000).sin()[:, None, None], self.prompt(text).mean(1, keepdim=True)
        for index, block in enumerate(self.blocks):
            if index not in skip:
                h = h + (block(h) + text).tanh()
        return self.leave(h)


Model = Callable[..., Tensor]  # (branch, x, level, text, ...)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


P, Q = normal(1, 1, 6, 8), normal(2, 1, 6, 8)
X = normal(3, 1, 8, 4)


def plain(model: Model) -> None:
    x = X
    for level in LEVELS:
        x = x - 0.1 * model("only", x, level, P)


def guided(model: Model) -> None:
    """Two calls a step."""
    x = X
    for level in LEVELS:
        x = x - 0.1 * (2 * model("cond", x, level, P) - model("uncond", x, level, Q))


def guided_anew(model: Model) -> None:
    """Two calls a step, with prompt tensors that are made anew."""
    x = X
    for level in LEVELS:
        x = x - 0.1 * (2 * model("cond", x, level, P.clone()) - model("uncond", x, level, torch.zeros_like(P)))


def tiles(model: Model) -> None:
    """Three tiles with one prompt."""
    x = normal(4, 1, 24, 4)
    for level in LEVELS:
        x = x - 0.1 * torch.cat([model(j, x[:, 8 * j : 8 * j + 8], level, P) for j in range(3)], 1)


def five_prompts(model: Model) -> None:
    x, texts = X, [P + number for number in range(5)]
    for level in LEVELS:
        x = x - 0.1 * sum(model(j, x, level, text) for j, text in enumerate(texts)) / 5


def few_steps_of_four_prompts(model: Model) -> None:
    """As many prompts as steps."""
    x, texts = X, [P + number for number in range(4)]
    for level in LEVELS[:4]:
        x = x - 0.1 * sum(model(j, x, level, text) for j, text in enumerate(texts)) / 4


def half_guided(model: Model) -> None:
    """The unconditional call comes first, in the first half only."""
    x = X
    for step, level in enumerate(LEVELS):
        other = model("uncond", x, level, Q) if step < 5 else None
        out = model("cond", x, level, P)
        x = x - 0.1 * (out if other is None else 2 * out - other)


def guided_in_the_middle(model: Model) -> None:
    """A batch of one, then of two, then of one."""
    x, both = X, torch.cat([P, Q])
    for step, level in enumerate(LEVELS):
        if 3 <= step < 7:
            out = model("both", torch.cat([x, x]), level, both)
            x = x - 0.05 * (2 * out[:1] - out[1:])
        else:
            x = x - 0.05 * model("one", x, level, P)


def skipping(model: Model) -> None:
    """A second call that skips a layer, at some steps."""
    x = X
    for step, level in enumerate(LEVELS):
        out = model("all", x, level, P)
        less = model("less", x, level, P, skip=(1,)) if 2 <= step < 7 else out
        x = x - 0.1 * (1.5 * out - 0.5 * less)


def heun(model: Model, anew: bool = False) -> None:
    """Two evaluations a step, the second at the level of the next step."""

    def slope(x: Tensor, level: float) -> Tensor:
        if not anew:
            return model("only", x, level, P)
        return 2 * model("cond", x, level, P.clone()) - model("uncond", x, level, torch.zeros_like(P))

    x = X
    for level, after in zip(LEVELS, [*LEVELS[1:], None], strict=True):
        first = slope(x, level)
        if after is not None:
            x = x - 0.05 * (first + slope(x - 0.1 * first, after))


def guided_heun(model: Model) -> None:
    heun(model, anew=True)


# what must be found: the noise levels of the steps, and the inputs whose identity tells streams apart
LOOPS: dict[Callable[[Model], None], tuple[list[float], tuple[str, ...]]] = {
    plain: (LEVELS, ("text",)),
    guided: (LEVELS, ("text",)),
    guided_anew: (LEVELS, ()),
    tiles: (LEVELS, ("text",)),
    five_prompts: (LEVELS, ("text",)),
    few_steps_of_four_prompts: (LEVELS[:4], ("text",)),
    half_guided: (LEVELS, ("text",)),
    guided_in_the_middle: (LEVELS, ("text",)),
    skipping: (LEVELS, ("text",)),
    heun: (REPEATED, ("text",)),
    guided_heun: (REPEATED, ()),
}


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_the_layout_of_a_run_is_found(loop: Callable[[Model], None], monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net().eval().requires_grad_(False)
    recorder, branches, seen = Recorder(net), [], []
    own = Recorder._calls
    monkeypatch.setattr(Recorder, "_calls", lambda self, *given: seen.extend(found := own(self, *given)) or found)

    def model(branch: Any, x: Tensor, level: float, text: Tensor, **options: Any) -> Tensor:
        branches.append(branch)
        time = torch.tensor(level).expand(len(x))  # as pipelines make it, with a stride of 0
        return net(x, time, text, **options)

    with installed(net, recorder):
        loop(model)
    found = recorder.result()
    levels, keys = LOOPS[loop]
    assert list(found.levels) == levels
    assert (found.time, found.keys, found.varying) == ("t", keys, {"x", "t"})
    assert found.sample_path(found.first) == "x"
    right = [[index for index, own in enumerate(branches) if own == branch] for branch in dict.fromkeys(branches)]
    assert chains(seen) == sorted(right)
    assert found.moves is not None and found.moves.shape == (len(levels), len(levels))
    assert not found.moves.diagonal().any() and torch.equal(found.moves, found.moves.T)


def test_moves_are_shares_of_the_sample() -> None:
    """By hand: a sample that grows by a tenth of its first value at every step."""

    class Same(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x

    net = Same()
    recorder = Recorder(net)
    with installed(net, recorder):
        for step, level in enumerate(LEVELS[:4]):
            net(X * (1 + 0.1 * step), torch.tensor([level]))
    moves = recorder.result().moves
    assert moves is not None
    right = torch.tensor([[abs(a - b) / max(a, b) for a in (1, 1.1, 1.2, 1.3)] for b in (1, 1.1, 1.2, 1.3)])
    assert torch.allclose(moves.float(), right, atol=1e-5)
