"""Low-rank adapters of linear layers, wrapped around them in the ways that adapter libraries do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Adapted(nn.Module):
    """A linear layer with adapters beside it; those in `active` are added, and magnitudes scale where `scaled`."""

    def __init__(self, layer: nn.Linear, names: Sequence[str], rank: int = 2, scaled: bool = False) -> None:
        super().__init__()
        self.base_layer = layer
        self.down = nn.ModuleDict({n: nn.Linear(layer.in_features, rank, bias=False) for n in names})
        self.up = nn.ModuleDict({n: nn.Linear(rank, layer.out_features, bias=False) for n in names})
        self.magnitude = nn.Parameter(torch.rand(layer.out_features) + 0.5) if scaled else None
        self.active = list(names)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        own = total = self.base_layer(x)
        for name in self.active:
            more = self.up[name](self.down[name](x)) * 0.5
            if self.magnitude is not None:  # as DoRA: the weight's columns get a length of their own
                merged = self.base_layer.weight + 0.5 * self.up[name](self.down[name](torch.eye(x.shape[-1]))).T
                length = (self.magnitude / torch.linalg.norm(merged, dim=1)).view(1, -1)
                more = (length - 1) * own + length * more
            total = total + more
        return total


def adapt(module: nn.Module, ends: Sequence[str], names: Sequence[str] = ("a",), scaled: bool = False) -> list[Adapted]:
    """Sets adapters on every linear layer whose path ends in one of `ends`."""
    made = []
    layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    for path, layer in layers:
        if path.endswith(tuple(ends)):
            owner, _, key = path.rpartition(".")
            made.append(Adapted(layer, names, scaled=scaled))
            setattr(module.get_submodule(owner), key, made[-1])
    return made


def fuse(module: nn.Module) -> None:
    """Adds what adapters add to the weights of their layers, and takes them off."""
    for path, adapted in [(p, m) for p, m in module.named_modules() if isinstance(m, Adapted)]:
        owner, _, key = path.rpartition(".")
        for name in adapted.active:
            up, down = (part.get_parameter(f"{name}.weight") for part in (adapted.up, adapted.down))
            adapted.base_layer.weight += 0.5 * up @ down
        setattr(module.get_submodule(owner), key, adapted.base_layer)
