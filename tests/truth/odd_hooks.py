"""Odd modules with hooks and parametrizations: they collect, count, change arguments and answers, or write weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from .odd_modules import LEVELS, Net, Prompt, See, level, loop, odd

COLLECTED: list[Any] = []


def empty(net: Any) -> None:
    """A user empties the list that his hooks fill."""
    COLLECTED.clear()


@odd("hooks", between=empty, outside=True, watched=lambda: COLLECTED)
class CollectsFeatures(Net):
    """A hook of the user's own appends what a layer gives to a list of his."""

    def __init__(self):
        super().__init__()
        self.text.register_forward_hook(lambda module, args, out: COLLECTED.append(out))


@odd("hooks")
class CollectsOnItself(Net):
    """The same, into a list of the module."""

    def __init__(self):
        super().__init__()
        self.features = []
        self.into.register_forward_hook(lambda module, args, out: self.features.append(out.mean()))


@odd("hooks", between=empty, outside=True, watched=lambda: COLLECTED)
class CollectsWhatItIsGiven(Net):
    """A pre-hook on the denoiser itself collects the arguments that come by name."""

    def __init__(self):
        super().__init__()
        self.register_forward_pre_hook(
            lambda module, args, kwargs: COLLECTED.append((len(args), sorted(kwargs))), with_kwargs=True
        )


@odd("hooks")
class CountsByAHook(Net):
    """A hook counts the calls of a layer on the layer."""

    def __init__(self):
        super().__init__()
        self.out.calls = 0

        def count(module, args):
            module.calls += 1

        self.out.register_forward_pre_hook(count)


@odd("hooks")
class ChangesALayersAnswer(Net):
    """A hook changes what a layer gives."""

    def __init__(self):
        super().__init__()
        self.text.register_forward_hook(lambda module, args, out: out.sin())


@odd("hooks")
class ChangesItsArguments(Net):
    """A pre-hook on the denoiser itself changes an argument."""

    def __init__(self):
        super().__init__()

        def larger(module, args, kwargs):
            return (args[0], args[1] * 2, *args[2:]), kwargs

        self.register_forward_pre_hook(larger, with_kwargs=True)


@odd("hooks")
class ChangesItsAnswer(Net):
    """A hook on the denoiser itself changes its answer, which depends on an argument."""

    def __init__(self):
        super().__init__()
        self.register_forward_hook(lambda module, args, kwargs, out: out + args[0].mean(), with_kwargs=True)


@odd("hooks", uncacheable=True, outside=True, between=empty, watched=lambda: COLLECTED)
class ScalesByCollected(Net):
    """A hook on the denoiser scales the answer by the number of calls that it has seen."""

    def __init__(self):
        super().__init__()

        def scale(module, args, out):
            COLLECTED.append(len(COLLECTED))
            return out * len(COLLECTED)

        self.register_forward_hook(scale)


@odd("hooks")
class HookOnce(Net):
    """A hook that takes itself off at its first call."""

    def __init__(self):
        super().__init__()
        self.first = None

        def once(module, args, out):
            self.first = float(out.mean())
            self.handle.remove()

        self.handle = self.into.register_forward_hook(once)


@odd("hooks")
class HooksBackward(Net):
    """A hook for gradients, on a layer that is run without any."""

    def __init__(self):
        super().__init__()
        self.out.register_full_backward_hook(lambda module, given, taken: None)


def guided(net: Any, prompt: Prompt, see: See) -> Tensor:
    """A loop that guides by the gradient of the answer."""
    x = prompt.x
    for value in LEVELS:
        asking = x.detach().requires_grad_()
        out = net(asking, level(x, value), prompt.ctx)
        (gradient,) = torch.autograd.grad(out.square().mean(), asking)
        see(out.detach(), gradient)
        x = x - 0.1 * out.detach() - gradient
    return x


@odd("hooks", loop=guided, by_hand=False)
class CountsGradients(Net):
    """A backward hook that counts, in a loop that guides by gradients."""

    def __init__(self):
        super().__init__()
        self.backwards = 0

        def count(module, given, taken):
            self.backwards += 1

        self.out.register_full_backward_hook(count)


def with_global_hook(net: Any) -> contextlib.AbstractContextManager[None]:
    """A hook on all modules that there are, while the denoiser runs."""

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        def collect(module, args, out):
            if isinstance(module, nn.Linear):
                COLLECTED.append(module.out_features)

        handle = nn.modules.module.register_module_forward_hook(collect)
        try:
            yield
        finally:
            handle.remove()

    return around()


@odd("hooks", around=with_global_hook, between=empty, outside=True, watched=lambda: COLLECTED)
class HookedWithAllOthers(Net):
    """Its user has set a hook on all modules, which collects."""


@odd("hooks")
class WeightNorm(Net):
    """A weight that is made of two at every call."""

    def __init__(self):
        super().__init__()
        self.out = parametrizations.weight_norm(self.out)


class Symmetric(nn.Module):
    """A symmetric matrix from any."""

    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(0, 1)


@odd("hooks")
class Parametrized(Net):
    """A weight that a module makes of another."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)
        parametrize.register_parametrization(self.mix, "weight", Symmetric())

    def forward(self, x, t, ctx):
        return self.out(self.mix(self.hidden(x, t, ctx)))


@odd("hooks")
class SpectralNorm(Net):
    """A weight divided by its norm, in eval mode: the norm's vectors stand still."""

    def __init__(self):
        super().__init__()
        self.out = parametrizations.spectral_norm(self.out)


@odd("hooks", uncacheable=True)
class SpectralNormThatIterates(Net):
    """The same in training mode: every call writes the vectors."""

    def __init__(self):
        super().__init__()
        self.mix = parametrizations.spectral_norm(nn.Linear(8, 8))

    def prepared(self):
        self.eval()
        self.mix.train()
        return self

    def forward(self, x, t, ctx):
        return self.out(self.mix(self.hidden(x, t, ctx)))


class Iterates:
    """A pre-hook of the old kind: writes a weight before every call."""

    def __call__(self, module, args):
        module.weight.data.mul_(0.99)


@odd("hooks", uncacheable=True)
class WritesWeightsInAHook(Net):
    """A pre-hook writes a layer's weight."""

    def __init__(self):
        super().__init__()
        self.out.register_forward_pre_hook(Iterates())


@odd("hooks", refused="replaced forward")
class PatchedLayer(Net):
    """A layer whose forward was replaced by a partial function that counts."""

    def __init__(self):
        super().__init__()
        self.counts = {"into": 0}

        def patched(original, h):
            self.counts["into"] += 1
            return original(h) * 2

        self.into.forward = functools.partial(patched, self.into.forward)


def hooked_in_the_middle(net: Any, prompt: Prompt, see: See) -> Tensor:
    """Its user hooks a layer for every other generation."""
    layer = getattr(net, "net", net).text
    handle = layer.register_forward_hook(lambda module, args, out: out * 2) if prompt.index % 2 else None
    try:
        return loop(net, prompt, see)
    finally:
        if handle is not None:
            handle.remove()


@odd("hooks", loop=hooked_in_the_middle, by_hand=False)
class HookedNowAndThen(Net):
    """The plain denoiser, whose user sets a hook for a while."""
