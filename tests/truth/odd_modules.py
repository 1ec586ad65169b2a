"""What an odd module is: a small denoiser that does something unusual, the loop that uses it, and what may come of it.

The modules stand by kind in the other odd_*.py files; test_odd_modules.py holds each beside a twin that is never
compiled.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LEVELS = (0.9, 0.7, 0.5, 0.3, 0.1)
SIZES = ((2, 8, 6), (2, 8, 6), (1, 5, 3), (1, 5, 3))  # of four prompts: samples, tokens, tokens of the text

See = Callable[..., None]  # a loop gives it everything that its user would look at


@dataclass(frozen=True)
class Prompt:
    """What one generation is of: the noise to begin with and the text."""

    x: Tensor
    ctx: Tensor
    index: int

    @staticmethod
    def of(index: int) -> Prompt:
        """Prompt number `index` of the four; always the same values, in tensors of its own."""
        samples, tokens, text = SIZES[index % len(SIZES)]
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(samples, tokens, 4, generator=generator)
        return Prompt(x, torch.randn(samples, text, 6, generator=generator), index)


class Net(nn.Module):
    """The plain denoiser that the odd ones are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.text, self.out = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(8, 4)

    def hidden(self, x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        """What the tokens, the level and the text make together."""
        return (self.into(x) + self.text(ctx).mean(1, keepdim=True) + t[:, None, None].sin()).tanh()

    def forward(self, x: Tensor, t: Tensor, ctx: Tensor) -> Any:
        return self.out(self.hidden(x, t, ctx))


def level(x: Tensor, value: float) -> Tensor:
    """The level as most denoisers take it: one number per sample."""
    return torch.full((len(x),), value)


def loop(net: Any, prompt: Prompt, see: See) -> Tensor:
    """The plain sampling loop of five steps."""
    x = prompt.x
    with torch.no_grad():
        for value in LEVELS:
            out = net(x, level(x, value), prompt.ctx)
            see(out, x, prompt.ctx)
            x = x - 0.1 * first_of(out)
    return x


def first_of(out: Any) -> Tensor:
    """The first tensor of an answer, however it is wrapped."""
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


def nothing(net: Any) -> None:
    """What is done between two generations with most modules."""


@contextlib.contextmanager
def as_it_is(net: Any) -> Iterator[None]:
    """The surroundings of most modules."""
    yield


@dataclass(frozen=True)
class Odd:
    """One odd module.

    `start` is called once before it is used, `between` before every generation. `refused` is the pattern of a refusal
    that is as good as serving it. `uncacheable` says that reusing an output cannot be right, so that the summary has to
    say what was found; `outside`, that it keeps something where a compiler of modules cannot look for it (a global, a
    closure): compiling may move that, serving may not. `by_hand` is False where the loop does not call the module
    once a step, so that a cache written by hand in one line would be another one. `long` ones are like others that
    are not, and not in the default run. What `watched` gives is part of what a call leaves behind.
    """

    name: str
    kind: str
    make: Callable[[], nn.Module]
    loop: Callable[[Any, Prompt, See], Any]
    between: Callable[[Any], None]
    start: Callable[[Any], None]
    around: Callable[[Any], AbstractContextManager[None]]
    refused: str
    uncacheable: bool
    outside: bool
    by_hand: bool
    long: bool
    watched: Callable[[], Any]

    def build(self) -> nn.Module:
        """A new module; two of them are equal."""
        seed(0)
        return self.make()


ODD: dict[str, Odd] = {}


def odd(
    kind: str,
    *,
    loop: Callable[[Any, Prompt, See], Any] = loop,
    between: Callable[[Any], None] = nothing,
    start: Callable[[Any], None] = nothing,
    around: Callable[[Any], AbstractContextManager[None]] = as_it_is,
    refused: str = "",
    uncacheable: bool = False,
    outside: bool = False,
    by_hand: bool = True,
    long: bool = False,
    watched: Callable[[], Any] = lambda: None,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Adds a class of modules to the odd ones, in eval mode, under its name in words."""

    def add(kind_of_net: type[nn.Module]) -> type[nn.Module]:
        name = re.sub(r"(?<!^)(?=[A-Z])", " ", kind_of_net.__name__).lower()
        assert name not in ODD, name
        prepare = getattr(kind_of_net, "prepared", nn.Module.eval)
        ODD[name] = Odd(
            name=name,
            kind=kind,
            make=lambda: prepare(kind_of_net()),
            loop=loop,
            between=between,
            start=start,
            around=around,
            refused=refused,
            uncacheable=uncacheable,
            outside=outside,
            by_hand=by_hand,
            long=long,
            watched=watched,
        )
        return kind_of_net

    return add


def seed(number: int) -> None:
    """Seeds the three generators that modules draw from."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)
