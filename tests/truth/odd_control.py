"""Odd modules by how they run: gradients inside, loops and branches on data, numpy, errors, threads, operators."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .odd_hooks import guided
from .odd_modules import LEVELS, Net, Prompt, See, level, odd


@odd("control")
class GuidesItself(Net):
    """Follows the gradient of its own energy, with gradients enabled inside."""

    def forward(self, x, t, ctx):
        with torch.enable_grad():
            asking = x.detach().requires_grad_()
            energy = super().forward(asking, t, ctx).square().sum()
            return torch.autograd.grad(energy, asking)[0]


@odd("control")
class AsksItsInputForGradients(Net):
    """Sets the flag of the very tensor that it was given."""

    def forward(self, x, t, ctx):
        with torch.enable_grad():
            x.requires_grad_()
            energy = super().forward(x, t, ctx).square().sum()
            return torch.autograd.grad(energy, x)[0].detach()


@odd("control", loop=guided, by_hand=False)
class GuidedByItsUser(Net):
    """The plain denoiser, in a loop that guides by gradients."""


def guided_by_a_loss(net: Any, prompt: Prompt, see: See) -> Tensor:
    """A loop that trains an offset of the text on the way, in a context that enables gradients."""
    x, offset = prompt.x, torch.zeros(1, 1, 6)
    for value in LEVELS:
        with torch.enable_grad():
            offset = offset.detach().requires_grad_()
            out = net(x, level(x, value), prompt.ctx + offset)
            out.square().mean().backward()
        assert offset.grad is not None
        see(out.detach(), offset.grad.clone())
        offset, x = offset.detach() - offset.grad, x - 0.1 * out.detach()
    return x


def without_gradients(net: Any) -> None:
    """Forgets the gradients of the weights."""
    net.zero_grad()


@odd("control", loop=guided_by_a_loss, by_hand=False, between=without_gradients)
class TrainsItsText(Net):
    """The plain denoiser, whose text is optimised while it runs: the weights get gradients too."""


@odd("control")
class Checkpoints(Net):
    """Would compute a part again for gradients."""

    def forward(self, x, t, ctx):
        return self.out(checkpoint(self.hidden, x, t, ctx, use_reentrant=False))


@odd("control")
class WithoutGradientsInside(Net):
    """A part of it runs without gradients."""

    def forward(self, x, t, ctx):
        with torch.no_grad():
            h = self.hidden(x, t, ctx)
        return self.out(h)


@odd("control")
class InferenceModeInside(Net):
    """Runs in inference mode, so its answer is of that kind."""

    @torch.inference_mode()
    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx)


@odd("control")
class LoopsUntilSmall(Net):
    """Halves its values until they are small."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        while h.abs().max() > 0.3:
            h = h * 0.7
        return self.out(h)


@odd("control")
class TorchCond(Net):
    """A branch that stays a branch in the graph."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(torch.cond(t.mean() > 0.5, lambda h: h.sin(), lambda h: h.cos(), (h,)))


@odd("control")
class LoopsOverTokens(Net):
    """A recurrence over the tokens in Python."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        states = [h[:, 0]]
        for token in range(1, x.shape[1]):
            states.append((states[-1] + h[:, token]).tanh())
        return self.out(torch.stack(states, 1))


@odd("control")
class TakesTheLargeOnes(Net):
    """Works on as many tokens as are large."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        sample, token = (h.mean(-1) > 0).nonzero(as_tuple=True)
        return self.out(h.index_put((sample, token), h[sample, token].sin()))


@odd("control")
class RoutesToExperts(Net):
    """A mixture of experts by sorting and splitting."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        flat = h.flatten(0, 1)
        chosen = self.router(flat).argmax(-1)
        order = chosen.argsort(stable=True)
        parts = flat[order].split(torch.bincount(chosen, minlength=3).tolist())
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return self.out(h + torch.empty_like(flat).index_copy(0, order, done).reshape(h.shape))


def with_errors(net: Any, prompt: Prompt, see: See) -> Tensor:
    """A loop that goes on where the denoiser raises its own error."""
    x = prompt.x
    with torch.no_grad():
        for value in LEVELS:
            try:
                out = net(x, level(x, value), prompt.ctx)
            except ArithmeticError as error:
                see(str(error))
                continue
            see(out)
            x = x - 0.1 * out
    return x


@odd("control", loop=with_errors, by_hand=False)
class RaisesAtALevel(Net):
    """Raises an error of its own at one level."""

    def forward(self, x, t, ctx):
        if 0.4 < t[0] < 0.6:
            raise ArithmeticError(f"nothing to do at {t[0].item():.1f}")
        return super().forward(x, t, ctx)


@odd("control", loop=with_errors, by_hand=False)
class RaisesForASize(Net):
    """Raises an error of its own for few tokens."""

    def forward(self, x, t, ctx):
        if x.shape[1] < 6:
            raise ArithmeticError(f"{x.shape[1]} tokens are too few")
        return super().forward(x, t, ctx)


@odd("control")
class CatchesItsErrors(Net):
    """Tries what fails for some sizes and does something else then."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        with contextlib.suppress(RuntimeError):
            h = h.reshape(len(x), 2, -1, 8).mean(1).repeat_interleave(2, 1)
        return self.out(h)


@odd("control")
class GoesThroughNumpy(Net):
    """A part of it is numpy's."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx).detach().numpy()
        return self.out(torch.from_numpy(np.sort(h, axis=1)))


@odd("control")
class GoesThroughLists(Net):
    """A part of it is Python's numbers."""

    def forward(self, x, t, ctx):
        scales = [1 + value * value for value in t.tolist()]
        return super().forward(x * torch.tensor(scales)[:, None, None], t, ctx)


@odd("control")
class MapsOverSamples(Net):
    """A function of one sample, mapped over the batch, and its derivative."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        slopes = torch.func.vmap(torch.func.grad(lambda row: row.sin().sum()))(h)
        return self.out(h + slopes)


class Rounded(torch.autograd.Function):
    """Rounds, with a gradient as if it did not."""

    @staticmethod
    def forward(ctx, h):
        return (h * 16).round() / 16

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@odd("control")
class OwnFunction(Net):
    """An autograd function of its own."""

    def forward(self, x, t, ctx):
        return self.out(Rounded.apply(self.hidden(x, t, ctx)))


@odd("control")
class RunsInThreads(Net):
    """Two branches in two threads."""

    def forward(self, x, t, ctx):
        def branch(function):
            with torch.no_grad():
                return function(self.hidden(x, t, ctx))

        with ThreadPoolExecutor(2) as threads:
            parts = list(threads.map(branch, (torch.sin, torch.cos)))
        return self.out(parts[0] + parts[1])


@odd("control")
class CallsItself(Net):
    """Calls itself, as a module and as a function, on half of the tokens."""

    def forward(self, x, t, ctx, depth=0):
        if depth == 2:
            return super().forward(x, t, ctx)
        half = x.shape[1] // 2
        return torch.cat([self(x[:, :half], t, ctx, depth=2), self.forward(x[:, half:], t, ctx, 2)], 1)


@torch.library.custom_op("odd::halve", mutates_args=())
def halve(h: Tensor) -> Tensor:
    """An operator that cannot be traced, because nothing says what shape it gives."""
    return h / 2


@odd("control")
class OwnOperator(Net):
    """An operator of its own, which says nothing about shapes."""

    def forward(self, x, t, ctx):
        return self.out(halve(self.hidden(x, t, ctx)))


@odd("control")
class CompiledInside(Net):
    """A part of it is compiled by torch, without a compiler."""

    def __init__(self):
        super().__init__()
        self.fast = torch.compile(torch.sin, backend="eager")

    def forward(self, x, t, ctx):
        return self.out(self.fast(self.hidden(x, t, ctx)))


@odd("control")
class WidthOfTheData(Net):
    """Gives as many numbers beside its answer as there are large ones."""

    def forward(self, x, t, ctx):
        out = super().forward(x, t, ctx)
        return out, out[out > 0.2]
