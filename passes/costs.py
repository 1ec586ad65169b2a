"""Analysis: what every node costs in one recorded call, in FLOPs and bytes, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dcc.passes.graph import layout
from dcc.torch_internals import CPU_ATTENTION, FakeTensorMode, pytree


@dataclass(frozen=True)
class Cost:
    """Cost of one node in one call: FLOPs (a multiply-add counts as two), bytes of its value and its concrete shape."""

    flops: int
    bytes: int
    shape: tuple[int, ...]


def costs(graph_module: GraphModule, inputs: Sequence[Any]) -> dict[str, Cost]:
    """Cost of every node, by name, for concrete `inputs` in placeholder order. Computes on fake tensors only.

    FLOPs are those that torch.utils.flop_counter counts: matrix products, convolutions and attention.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        known: dict[Any, Tensor] = {}
        fakes = [_fake(mode, value, known) if isinstance(value, Tensor) else value for value in inputs]
        meter = _Meter(graph_module)
        with meter.counter:
            meter.run(*fakes)
    return meter.costs


def _fake(mode: FakeTensorMode, tensor: Tensor, known: dict[Any, Tensor]) -> Tensor:
    """A fake tensor like this one; tensors of one type and layout share one."""
    key = type(tensor), *layout(tensor)
    if key not in known:
        known[key] = mode.from_tensor(tensor)
    return known[key]


def _attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


FLOP_FORMULAS = {CPU_ATTENTION: _attention_flops}  # what torch's own table leaves out


class _Meter(Interpreter):
    """Counts the cost of every node while it runs; equal calls, such as those of repeated blocks, are made once."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=True)
        self.costs: dict[str, Cost] = {}
        self.counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
        self.known: dict[Any, tuple[Any, int]] = {}  # value and FLOPs

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = (target, spec, *(layout(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves))
        if key not in self.known:
            before = self.counter.get_total_flops()
            value = super().call_function(target, args, kwargs)
            self.known[key] = value, self.counter.get_total_flops() - before
        return self.known[key]

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        value, flops = value if n.op == "call_function" else (value, 0)
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        size = value.numel() * value.element_size() if isinstance(value, Tensor) else 0
        self.costs[n.name] = Cost(flops, size, shape)
        return value
