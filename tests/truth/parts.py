"""Where the changes are made: the same parts of either denoiser, a submodule that reads much state, and undoing."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from .loops import Loop
from .table import Undo


def block(loop: Loop) -> nn.Module:
    """The first transformer block."""
    net = loop.net
    return net.transformer_blocks[0] if loop.model == "dit" else net.down_blocks[0].attentions[0].transformer_blocks[0]


def attention(loop: Loop) -> nn.Module:
    """Its attention (of a U-Net: its self-attention)."""
    return block(loop).attn if loop.model == "dit" else block(loop).attn1


def linear(loop: Loop) -> nn.Linear:
    """The last layer of its MLP."""
    mlp = block(loop).ff
    return (mlp.mlp if isinstance(mlp, Knobs) else mlp).net[2]


def noise(like: Tensor, seed: int = 7) -> Tensor:
    """Small random numbers in the shape of a tensor."""
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return (0.1 * drawn).to(like.dtype)


def put(owner: Any, name: str, value: Any) -> Undo:
    """Sets an attribute, and undoes it; one that was the class's own is taken off again."""
    own = name in vars(owner) or (isinstance(owner, nn.Module) and name in {**owner._parameters, **owner._modules})
    before = getattr(owner, name)
    setattr(owner, name, value)

    def undo() -> None:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

    return undo


class Shift(nn.Module):
    """Adds a number to what it is called with; not registered where `Knobs` holds it."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def double(x: Tensor) -> Tensor:
    """A function that `Knobs` calls."""
    return 2 * x


class Knobs(nn.Module):
    """An MLP that reads state of every kind that a Python object can hold."""

    gain = 1.0  # of the class

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.number, self.whole, self.flag, self.text, self.nothing = 0.9, 2, False, "add", None
        self.items, self.table = [0.1, 0.2], {"a": 0.3}
        self.names, self.pair = {"a"}, (1.0, 2.0)
        self.nested = types.SimpleNamespace(inner=types.SimpleNamespace(gain=1.1))
        self.function = double
        self.parts = [Shift(0.1)]  # not registered
        self.tensors = [torch.full((1,), 0.1)]
        self.plain = types.SimpleNamespace(tensor=torch.full((1,), 0.2))
        self.register_buffer("shift", torch.full((1,), 0.3))
        self.register_buffer("passing", torch.full((1,), 0.4), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.mlp(x) * (self.number * self.gain * self.nested.inner.gain) + self.whole
        y = y + x if self.text == "add" else y - x
        y = y + (self.items[0] + self.table["a"] + self.pair[0] + len(self.names) + len(self.items))
        y = y if self.nothing is None else y * self.nothing
        y = -y if self.flag else y
        y = self.parts[0](self.function(y)) + self.tensors[0] + self.plain.tensor + self.shift + self.passing
        return y if self.absent is None else y * self.absent


def knobs(loop: Loop) -> None:
    """Base: the first block's MLP is wrapped in `Knobs`."""
    block(loop).ff = Knobs(block(loop).ff)
