"""The smallest denoiser and its loop, and compiled denoisers that are called themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import dcc


class Net(nn.Module):
    """Doubles its input and adds a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.called = 0

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return 2 * x + self.weight


def sample(net, prompt):
    """A loop of four steps, as a user of a bare module writes it."""
    x = torch.full((1, 2), float(prompt))
    for step in range(4):
        with torch.no_grad():
            x = x - 0.1 * net(x, torch.full((1,), 1 - step / 4))
    return x


def apart(module: nn.Module, prompts: Any, **options: Any) -> dcc.CompiledDenoiser:
    """`dcc.compile`, then taken off the module, which is as it was."""
    net = dcc.compiled(dcc.compile(module, prompts, **options))
    dcc.restore(module)
    return net
