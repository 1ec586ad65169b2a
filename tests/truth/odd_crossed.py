"""Odd modules that are odd in two ways at once, or late: nothing shows at the first call."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from .odd_branches import with_ints
from .odd_containers import Output
from .odd_modules import LEVELS, Net, Prompt, See, first_of, level, odd
from .odd_state import clear


@odd("crossed", between=clear)
class KeepsTextUnderAutocast(Net):
    """Keeps what it made of the text, in the number type of autocast inside."""

    kept: Tensor | None = None

    def clear(self):
        self.kept = None

    def forward(self, x, t, ctx):
        with torch.autocast("cpu", torch.bfloat16):
            if self.kept is None:
                self.kept = self.text(ctx).mean(1, keepdim=True)
            return self.out((self.into(x) + self.kept + t[:, None, None].sin()).tanh()).float()


@odd("crossed", uncacheable=True)
class CountsAndDraws(Net):
    """Draws at every third call, as its counter says."""

    calls = 0

    def forward(self, x, t, ctx):
        self.calls += 1
        return super().forward(x, t, ctx) + (torch.rand(()) if self.calls % 3 == 0 else 0)


@odd("crossed", between=clear)
class KeepsTextInAHook(Net):
    """A hook on the text's layer gives the first answer again until `clear()`."""

    def __init__(self):
        super().__init__()
        self.kept = {}
        self.text.register_forward_hook(lambda module, args, out: self.kept.setdefault("text", out))

    def clear(self):
        self.kept.clear()


@odd("crossed", between=clear, uncacheable=True, refused="in structures that differ")
class GivesItsState(Net):
    """Its answer is the dict that it keeps, a new list in it at every call."""

    def __init__(self):
        super().__init__()
        self.answers = {}

    def clear(self):
        self.answers = {}

    def forward(self, x, t, ctx):
        out = super().forward(x, t, ctx)
        self.answers["sample"] = out + sum(self.answers.get("all", []))
        self.answers["all"] = [*self.answers.get("all", []), out]
        return self.answers


@odd("crossed", between=clear, uncacheable=True)
class KeysInItsParts(Net):
    """Two layers, each with the keys of the calls before, and an answer of the kind that diffusers has."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(Attends() for _ in range(2))

    def clear(self):
        for part in self.parts:
            part.keys = None

    def forward(self, x, t, ctx, return_dict=True):
        h = self.hidden(x, t, ctx)
        for part in self.parts:
            h = h + part(h)
        return Output(self.out(h))


class Attends(nn.Module):
    """Attends to all that it was ever given."""

    keys: Tensor | None = None

    def forward(self, h):
        self.keys = h if self.keys is None else torch.cat([self.keys, h], 1)
        return (h @ self.keys.transpose(1, 2)).softmax(-1) @ self.keys


@odd("crossed")
class KeepsTextOfSmallOnes(Net):
    """Keeps what it made of a text for batches of one only, for as long as it is the same tensor."""

    known = kept = None

    def forward(self, x, t, ctx):
        if len(x) > 1:
            return super().forward(x, t, ctx)
        if self.known is not ctx:
            self.known, self.kept = ctx, self.text(ctx).mean(1, keepdim=True)
        return self.out((self.into(x) + self.kept + t[:, None, None].sin()).tanh())


@odd("crossed", between=clear, uncacheable=True)
class RemembersFromTheThird(Net):
    """Changes nothing at its first two calls; then every answer is in the next one."""

    def __init__(self):
        super().__init__()
        self.lengths, self.last = [], 0.0

    def clear(self):
        self.lengths, self.last = [], 0.0

    def forward(self, x, t, ctx):
        self.lengths.append(len(x))
        out = super().forward(x, t, ctx) + self.last
        if len(self.lengths) > 2:
            self.last = out
        return out


@odd("crossed", loop=with_ints, between=clear, long=True)
class KeepsAtLowLevels(Net):
    """Keeps what it made of the text at the lower levels, which are ints, and only there."""

    kept: Tensor | None = None

    def clear(self):
        self.kept = None

    def forward(self, x, t, ctx):
        text = self.text(ctx).mean(1, keepdim=True)
        if t < 400:
            self.kept = text if self.kept is None else self.kept
            text = self.kept * 2
        return self.out((self.into(x) + text + t / 1000).tanh())


def switched_on_the_way(net: Any, prompt: Prompt, see: See) -> Tensor:
    """Its user turns a switch of the module after the second step, and back at the end."""
    x, module = prompt.x, getattr(net, "net", net)
    with torch.no_grad():
        for step, value in enumerate(LEVELS):
            module.sharp = step > 1
            out = net(x, level(x, value), prompt.ctx)
            see(out)
            x = x - 0.1 * first_of(out)
    module.sharp = False
    return x


@odd("crossed", loop=switched_on_the_way)
class HasASwitchTurnedOnTheWay(Net):
    """Computes otherwise as a plain attribute says, which changes in the middle of a generation."""

    def __init__(self):
        super().__init__()
        self.sharp = False

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h.sin() if self.sharp else h)


@odd("crossed", uncacheable=True)
class DrawsLateAndRarely(Net):
    """Draws from Python's generator only where the sample is small, and only then anything changes."""

    def forward(self, x, t, ctx):
        out = super().forward(x, t, ctx)
        return out * (1 + random.random()) if len(x) == 1 else out


class Once:
    """Closed over: whether it was called more often than a few times."""

    def __init__(self):
        calls = 0

        def late():
            nonlocal calls
            calls += 1
            return calls > 8

        def restart():
            nonlocal calls
            calls = 0

        self.late, self.restart = late, restart


@odd("crossed", start=lambda net: net.once.restart(), outside=True, uncacheable=True)
class AnswersOtherwiseLate(Net):
    """After eight calls it answers otherwise, and what counts them is in a closure."""

    def __init__(self):
        super().__init__()
        self.once = Once()

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h.sin() if self.once.late() else h)


@odd("crossed", between=clear)
class WorksOnAViewOfItsState(Net):
    """Keeps the text's values in one long buffer, a view of which it works on and answers beside."""

    def __init__(self):
        super().__init__()
        self.register_buffer("room", torch.zeros(64), persistent=False)
        self.full = False

    def clear(self):
        self.full = False

    def forward(self, x, t, ctx):
        kept = self.room[: len(x) * 8].view(len(x), 1, 8)
        if not self.full:
            kept.copy_(self.text(ctx).mean(1, keepdim=True))
            self.full = True
        return self.out((self.into(x) + kept + t[:, None, None].sin()).tanh()), kept
