"""Analysis: how long every node takes in one real call, in seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node


def timings(graph_module: GraphModule, inputs: Sequence[Any], repeats: int = 3) -> dict[str, float]:
    """Seconds of every node, by name, for concrete `inputs` in placeholder order: the median of `repeats` calls.

    Runs node by node, waiting for the device after each, after one call that does not count.
    """
    clock = _Clock(graph_module, next((value.device for value in inputs if isinstance(value, Tensor)), None))
    with torch.no_grad():
        for _ in range(repeats + 1):
            clock.run(*inputs)
    return {name: statistics.median(seconds[1:]) for name, seconds in clock.seconds.items()}


class _Clock(Interpreter):
    def __init__(self, graph_module: GraphModule, device: torch.device | None) -> None:
        super().__init__(graph_module, garbage_collect_values=True)
        self.seconds: dict[str, list[float]] = {}
        self.synchronize = torch.cuda.synchronize if device is not None and device.type == "cuda" else lambda: None

    def run_node(self, n: Node) -> Any:
        start = time.perf_counter()
        value = super().run_node(n)
        self.synchronize()
        self.seconds.setdefault(n.name, []).append(time.perf_counter() - start)
        return value
