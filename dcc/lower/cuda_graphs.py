"""One CUDA graph per program: a forecast step is a handful of short kernels, which take longer to launch than to run.

A graph reads and writes fixed addresses. Weights are read where they are; every other input is copied into a buffer of
the graph's own before a replay, and every output is copied out after it, so that anchors and samples never lie in
memory that the next replay writes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

MAX_RECORDINGS = 4  # per program; weights that move more often (offloading) are not worth a graph


class Pool:
    """The memory that all graphs of one device share, and whose turn it is to use it."""

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.Lock()
        self.handle = torch.cuda.graph_pool_handle()
        self.device, self.done = device, torch.cuda.Event()

    def enter(self) -> None:
        """Makes the current CUDA stream wait for what another one still does in this memory."""
        torch.cuda.current_stream(self.device).wait_event(self.done)

    def leave(self) -> None:
        """Marks the point after which another CUDA stream may use this memory."""
        self.done.record(torch.cuda.current_stream(self.device))

    def record(
        self, call: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
    ) -> tuple[Callable[[], None], list[Tensor]]:
        """Records `call(*inputs)`; returns what replays it, and the tensors that a replay fills."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            call(*inputs)  # kernels are loaded at their first launch, which cannot be recorded
            with torch.cuda.graph(graph, pool=self.handle, capture_error_mode="thread_local"):
                outputs = list(call(*inputs))
        return graph.replay, outputs


@functools.cache
def pool_of(device: torch.device) -> Pool:
    """The pool of a device, made when first asked for."""
    return Pool(device)


class Graphed:
    """A lowered call that replays a CUDA graph; recorded at its first call and again where a weight has moved.

    `problem` says why it no longer replays one.
    """

    def __init__(self, call: Callable[..., Sequence[Tensor]], pool: Pool) -> None:
        self.call, self.pool = call, pool
        self.recordings, self.problem = 0, None
        self.addresses: tuple[int, ...] | None = None
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.replay: Callable[[], None] = lambda: None

    def __call__(self, *values: Tensor) -> list[Tensor]:
        with self.pool.lock:
            addresses = tuple(value.data_ptr() for value in values if isinstance(value, nn.Parameter))
            if addresses != self.addresses and self.recordings >= MAX_RECORDINGS:
                self.problem = f"runs without a CUDA graph: its weights have moved {MAX_RECORDINGS} times"
                return list(self.call(*values))
            self.pool.enter()
            if addresses != self.addresses:
                self.inputs = [value if isinstance(value, nn.Parameter) else value.clone() for value in values]
                self.replay, self.outputs = self.pool.record(self.call, self.inputs)
                self.addresses, self.recordings = addresses, self.recordings + 1
            for own, value in zip(self.inputs, values, strict=True):
                if not isinstance(value, nn.Parameter):
                    own.copy_(value)
            self.replay()
            outputs = [output.clone() for output in self.outputs]
            self.pool.leave()
        return outputs


def refusal(values: Sequence[Tensor]) -> str | None:
    """Why a call on these inputs cannot be a CUDA graph; None where it can."""
    devices = {str(value.device) for value in values}
    if len(devices) == 1 and values[0].is_cuda:
        return None
    return f"inputs are on {', '.join(sorted(devices))}; a CUDA graph takes tensors on one GPU only"
