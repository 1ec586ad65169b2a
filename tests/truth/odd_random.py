"""Odd modules that draw random numbers, from every generator there is."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .odd_modules import Net, odd


@odd("random", uncacheable=True)
class AddsNoise(Net):
    """Adds noise to its answer."""

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx) + 0.1 * torch.randn_like(x)


@odd("random")
class DrawsAndForgets(Net):
    """Draws noise and makes nothing of it, but the generator has moved."""

    def forward(self, x, t, ctx):
        torch.rand(3)
        return super().forward(x, t, ctx)


@odd("random", uncacheable=True)
class DropsWhileItTrains(Net):
    """A dropout layer that was left in training mode."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def prepared(self):
        self.eval()
        self.drop.train()
        return self

    def forward(self, x, t, ctx):
        return self.out(self.drop(self.hidden(x, t, ctx)))


@odd("random", uncacheable=True)
class AlwaysDrops(Net):
    """Dropout by the function, whatever the mode."""

    def forward(self, x, t, ctx):
        return self.out(F.dropout(self.hidden(x, t, ctx), 0.3, training=True))


@odd("random", uncacheable=True)
class NormalisesTheBatch(Net):
    """A batch norm that was left in training mode: it draws nothing, but learns from what it serves."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def prepared(self):
        self.eval()
        self.norm.train()
        return self

    def forward(self, x, t, ctx):
        return self.out(self.norm(self.hidden(x, t, ctx).transpose(1, 2)).transpose(1, 2))


@odd("random", uncacheable=True)
class DropsLayers(Net):
    """Leaves out a layer now and then, as Python's generator says."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(8, 8)

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h if random.random() < 0.5 else h + self.extra(h))


@odd("random", uncacheable=True)
class NoiseFromNumpy(Net):
    """Noise from numpy's global generator."""

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx) + torch.from_numpy(np.random.randn(*x.shape)).float()


@odd("random", uncacheable=True)
class OwnGenerator(Net):
    """A torch generator that belongs to the module."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx) + torch.randn(x.shape, generator=self.generator)


@odd("random", uncacheable=True)
class OwnPythonGenerator(Net):
    """A Python generator of random numbers that belongs to the module."""

    def __init__(self):
        super().__init__()
        self.random = random.Random(3)

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx) * (1 + self.random.random())


@odd("random", uncacheable=True)
class OwnNumpyGenerator(Net):
    """A numpy generator that belongs to the module."""

    def __init__(self):
        super().__init__()
        self.random = np.random.default_rng(3)

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx) * (1 + self.random.random())


@odd("random")
class FixedNoise(Net):
    """The same noise at every call, from a generator that it makes itself."""

    def forward(self, x, t, ctx):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
        return super().forward(x + 0.1 * noise, t, ctx)


@odd("random")
class FixedNoiseFromNumpy(Net):
    """The same from numpy, by way of an array."""

    def forward(self, x, t, ctx):
        noise = np.random.RandomState(7).randn(x.shape[1], 4).astype(np.float32)
        return super().forward(x + torch.from_numpy(noise), t, ctx)


@odd("random")
class SeedsTheGlobalGenerator(Net):
    """Seeds everyone's generator at every call, and draws."""

    def forward(self, x, t, ctx):
        torch.manual_seed(11)
        return super().forward(x + torch.rand(x.shape), t, ctx)


@odd("random")
class PutsTheGeneratorBack(Net):
    """Seeds, draws, and leaves the generator as it was."""

    def forward(self, x, t, ctx):
        with torch.random.fork_rng():
            torch.manual_seed(11)
            noise = torch.randn(x.shape)
        return super().forward(x + noise, t, ctx)


@odd("random", uncacheable=True)
class RoutesAtRandom(Net):
    """Takes tokens as a draw says that depends on the values."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        drawn = torch.multinomial(h.mean(-1).softmax(-1), x.shape[1], replacement=True)
        return self.out(h.gather(1, drawn[..., None].expand(-1, -1, 8)))


@odd("random")
class NoiseDrawnOnce(Net):
    """Draws noise at the first call of a size and keeps it."""

    def __init__(self):
        super().__init__()
        self.noises = {}

    def forward(self, x, t, ctx):
        key = tuple(x.shape)
        if key not in self.noises:
            self.noises[key] = torch.randn(key)
        return super().forward(x + self.noises[key], t, ctx)


@odd("random", uncacheable=True)
class MasksInPlace(Net):
    """Draws a mask into a tensor that it has made."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h * torch.empty_like(h).bernoulli_(0.8))
