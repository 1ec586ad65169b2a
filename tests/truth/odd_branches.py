"""Odd modules that branch on what they are given and on where they run: types, values, shapes, flags, modes."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .odd_modules import LEVELS, Net, Prompt, See, first_of, level, loop, odd


def with_ints(net: Any, prompt: Prompt, see: See) -> Tensor:
    """The level is a Python int."""
    x = prompt.x
    with torch.no_grad():
        for value in (950, 700, 500, 300, 100):
            out = net(x, value, prompt.ctx)
            see(out)
            x = x - 0.1 * out
    return x


@odd("branches", loop=with_ints)
class AsksForAnInt(Net):
    """An int means thousandths, a tensor means the level itself."""

    def forward(self, x, t, ctx):
        t = level(x, t / 1000) if isinstance(t, int) else t.reshape(-1).expand(len(x)).float()
        return super().forward(x, t, ctx)


@odd("branches", loop=with_ints)
class LooksItUp(Net):
    """A table of Python numbers, by an int."""

    def __init__(self):
        super().__init__()
        self.table = [math.cos(k / 1000) for k in range(1000)]

    def forward(self, x, t, ctx):
        return super().forward(x, level(x, self.table[t]), ctx)


def with_floats(net: Any, prompt: Prompt, see: See) -> Tensor:
    """The level is a Python float."""
    x = prompt.x
    with torch.no_grad():
        for value in LEVELS:
            out = net(x, value, ctx=prompt.ctx)
            see(out)
            x = x - 0.1 * out
    return x


@odd("branches", loop=with_floats, long=True)
class TakesAFloat(Net):
    """Computes with `math` on a float, and branches on it."""

    def forward(self, x, t, ctx):
        h = self.into(x) + self.text(ctx).mean(1, keepdim=True) + math.sin(t)
        return self.out(h.tanh() if t > 0.5 else h.sin())


def with_or_without_dimension(net: Any, prompt: Prompt, see: See) -> Tensor:
    """The level has no dimension in every other generation."""
    x = prompt.x
    with torch.no_grad():
        for value in LEVELS:
            out = net(x, torch.tensor(value) if prompt.index % 2 else level(x, value), prompt.ctx)
            see(out)
            x = x - 0.1 * out
    return x


@odd("branches", loop=with_or_without_dimension, long=True)
class AsksForTheDimensions(Net):
    """A level without dimension is taken for all samples, and differently."""

    def forward(self, x, t, ctx):
        return super().forward(x, (t * 2).expand(len(x)) if t.dim() == 0 else t, ctx)


@odd("branches")
class AsksForTheValue(Net):
    """Computes otherwise at low levels, asked by `item()`."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h if t[0].item() > 0.5 else h.sin())


@odd("branches", long=True)
class AsksATensor(Net):
    """Computes otherwise where any of the samples is large."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h if (x.abs() > 2).any() else h.sin())


@odd("branches")
class AsksForTheSize(Net):
    """Computes otherwise for more than six tokens."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h if x.shape[1] > 6 else h.sin())


@odd("branches", long=True)
class ComparesSizes(Net):
    """Computes otherwise for an even number of tokens, and where the text is shorter than the sample."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        h = h.cos() if x.shape[1] % 2 == 0 else h
        return self.out(h.exp() if ctx.shape[1] * 3 < x.shape[1] * 2 else h)


@odd("branches")
class AsksForGradients(Net):
    """Computes otherwise where its input asks for gradients."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h.sin() if x.requires_grad or h.requires_grad else h)


def sliced(net: Any, prompt: Prompt, see: See) -> Tensor:
    """The sample is a part of a wider tensor in every other generation, so its memory has gaps."""
    x = torch.cat([prompt.x, prompt.x], -1)[..., :4] if prompt.index % 2 else prompt.x
    with torch.no_grad():
        for value in LEVELS:
            out = net(x, level(x, value), prompt.ctx)
            see(out)
            x.sub_(0.1 * out)
    return x


@odd("branches", loop=sliced)
class AsksForTheLayout(Net):
    """Computes otherwise on memory with gaps."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h if x.is_contiguous() else h.sin())


def of_two_types(net: Any, prompt: Prompt, see: See) -> Tensor:
    """Every other generation is in double precision."""
    x = prompt.x.double() if prompt.index % 2 else prompt.x
    with torch.no_grad():
        for value in LEVELS:
            out = net(x, level(x, value), prompt.ctx)
            see(out)
            x = x - 0.1 * out
    return x


@odd("branches", loop=of_two_types, long=True)
class AsksForTheType(Net):
    """Computes otherwise in double precision, and gives what it was given."""

    def forward(self, x, t, ctx):
        h = self.hidden(x.float(), t, ctx)
        return self.out(h.sin() if x.dtype is torch.float64 else h).to(x.dtype)


@odd("branches")
class AsksForTheDevice(Net):
    """Computes otherwise on the CPU."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h.sin() if x.device.type == "cpu" else h)


def now_and_then_with_gradients(net: Any, prompt: Prompt, see: See) -> Tensor:
    """Every other generation runs with gradients enabled, which nobody uses."""
    x = prompt.x
    with torch.set_grad_enabled(prompt.index % 2 == 1):
        for value in LEVELS:
            out = net(x, level(x, value), prompt.ctx)
            see(out.detach())
            x = x - 0.1 * out.detach()
    return x


@odd("branches", loop=now_and_then_with_gradients, by_hand=False)
class AsksWhetherGradientsAreOn(Net):
    """Computes otherwise where gradients are enabled."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h.sin() if torch.is_grad_enabled() else h)


def now_and_then_under_autocast(net: Any, prompt: Prompt, see: See) -> Tensor:
    """Every other generation runs under autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=prompt.index % 2 == 1):
        return loop(net, prompt, see)


@odd("branches", loop=now_and_then_under_autocast)
class AsksForAutocast(Net):
    """Computes otherwise under autocast."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h.sin() if torch.is_autocast_enabled("cpu") else h)


@odd("branches")
class AsksWhetherItIsExported(Net):
    """Answers otherwise while it is exported."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h.sin() if torch.compiler.is_exporting() else h)


@odd("branches", long=True)
class AsksWhetherItIsCompiled(Net):
    """Answers otherwise while it is compiled."""

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx) + (1 if torch.compiler.is_compiling() else 0)


@odd("branches")
class AsksForTheKindOfTensor(Net):
    """Answers otherwise for everything that is not a plain tensor, as the values of a trace are not."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h if type(x) is Tensor else h.sin())


@odd("branches")
class CountsOnlyForReal(Net):
    """Leaves out a part of its work while it is traced, as code does that a tracer could not follow."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x, t, ctx):
        if not torch.compiler.is_compiling():
            self.seen += 1
            x = x * 1.5
        return super().forward(x, t, ctx)


@odd("branches")
class AsksForTheVersion(Net):
    """Computes otherwise on another Python, torch, or with an environment variable."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        if sys.version_info >= (3, 8) and torch.__version__ >= "1" and "DCC_NO_SUCH_VARIABLE" not in os.environ:
            h = h.sin()
        return self.out(h * torch.get_default_dtype().itemsize)


def switched(net: Any, prompt: Prompt, see: See) -> Tensor:
    """Its user turns a switch of the module between generations."""
    net = getattr(net, "net", net)
    net.sharp = prompt.index % 2 == 1
    return loop(net, prompt, see)


@odd("branches", loop=switched, by_hand=False)
class HasASwitch(Net):
    """Computes otherwise as a plain attribute says."""

    sharp = False

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h.sin() if self.sharp else h)


def some_without_text(net: Any, prompt: Prompt, see: See) -> Tensor:
    """Every other generation has no text."""
    x = prompt.x
    with torch.no_grad():
        for value in LEVELS:
            out = net(x, level(x, value), None if prompt.index % 2 else prompt.ctx)
            see(out)
            x = x - 0.1 * out
    return x


@odd("branches", loop=some_without_text, long=True)
class AsksForNone(Net):
    """Has a text of its own where none is given."""

    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x, t, ctx=None):
        return super().forward(x, t, self.empty.expand(len(x), 1, 6) if ctx is None else ctx)


def by_name(net: Any, prompt: Prompt, see: See) -> Tensor:
    """A string and a flag choose what is computed and how it is given back."""
    x = prompt.x
    with torch.no_grad():
        for value in LEVELS:
            out = net(x, level(x, value), prompt.ctx, ("sin", "cos")[prompt.index % 2], as_tuple=prompt.index > 1)
            see(out)
            x = x - 0.1 * first_of(out)
    return x


@odd("branches", loop=by_name, long=True)
class AsksForAName(Net):
    """A string names the function, a flag the structure of the answer."""

    def forward(self, x, t, ctx, mode="sin", *, as_tuple=False):
        out = self.out(getattr(torch, mode)(self.hidden(x, t, ctx)))
        return (out,) if as_tuple else out


@odd("branches", long=True)
class AsksForEqualRows(Net):
    """Computes otherwise where both samples have the same text."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h.sin() if torch.equal(ctx[:1], ctx[-1:]) else h)


def conditioned_on_itself(net: Any, prompt: Prompt, see: See) -> Tensor:
    """The first step is conditioned on the very same tensor."""
    x, before = prompt.x, prompt.x
    with torch.no_grad():
        for value in LEVELS:
            out = net(x, level(x, value), prompt.ctx, before)
            see(out)
            before, x = x, x - 0.1 * out
    return x


@odd("branches", loop=conditioned_on_itself, long=True)
class AsksForIdentity(Net):
    """Computes otherwise where two arguments are one tensor."""

    def forward(self, x, t, ctx, before):
        h = self.hidden(x, t, ctx)
        return self.out(h.sin() if before is x else h + self.into(before))


class Latent(Tensor):
    """A user's own kind of tensor."""


def with_a_subclass(net: Any, prompt: Prompt, see: See) -> Tensor:
    """The sample is of a subclass of Tensor."""
    x = prompt.x.as_subclass(Latent)
    with torch.no_grad():
        for value in LEVELS:
            out = net(x, level(x, value), prompt.ctx)
            see(out, type(out).__name__)
            x = x - 0.1 * out
    return x


@odd("branches", loop=with_a_subclass)
class KeepsTheKindOfTensor(Net):
    """Gives the subclass of Tensor that it was given."""


class Half(nn.Module):
    """Computes otherwise in training mode."""

    def forward(self, h):
        return h.sin() if self.training else h


@odd("branches")
class AsksForTraining(Net):
    """One of its submodules is in training mode for good, and computes otherwise there."""

    def __init__(self):
        super().__init__()
        self.inner = Half()

    def prepared(self):
        self.eval()
        self.inner.train()
        return self

    def forward(self, x, t, ctx):
        return self.out(self.inner(self.hidden(x, t, ctx)))
