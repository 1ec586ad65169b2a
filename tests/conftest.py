"""What every test shares: a clean `sys.path`, seeds, golden texts, and tiny denoisers that are captured once."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]  # `kernels` is not ours

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.fx import Graph, GraphModule, symbolic_trace  # noqa: E402
from torch.fx.passes.fake_tensor_prop import FakeTensorProp  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; Triton reads it when it is imported

os.environ["DCC_CACHE_DIR"] = ""  # every test captures its own graphs; those of the files on disk say otherwise

from dcc.capture import store  # noqa: E402
from dcc.capture.captured import Captured  # noqa: E402
from dcc.capture.export import capture  # noqa: E402
from dcc.record.call import Call, bind  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"

settings.register_profile("dcc", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("dcc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/<test>.txt instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    # pytest listens to loggers that do not propagate; torch then formats a stack for each symbol and guard of an export
    logging.getLogger("torch.__trace").propagate = True
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers in every test, and no DCC_* variable from the caller's shell."""
    torch.manual_seed(0)
    for name in [name for name in os.environ if name.startswith("DCC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DCC_CACHE_DIR", "")


@pytest.fixture
def graphs(seeded: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured graphs are kept for the other tests of this run, in all its processes: for tests of what comes after.

    The same few denoisers are compiled by many tests; a graph that is read is compared with its module.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "graphs"
    folder.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setenv("DCC_CACHE_DIR", str(folder))
    monkeypatch.setattr(store, "STORED", 4096)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compares a text with tests/golden/<test>.txt, or writes that file under --update-golden."""
    path = GOLDEN / (re.sub(r"[^\w.-]+", "_", request.node.name).strip("_") + ".txt")

    def check(text: str) -> None:
        if request.config.getoption("--update-golden"):
            GOLDEN.mkdir(exist_ok=True)
            path.write_text(text)
        elif not path.exists():
            pytest.fail(f"{path} is missing; run: pytest '{request.node.nodeid}' --update-golden, then read the file")
        assert text == path.read_text(), f"differs from {path}; if that is meant, run pytest with --update-golden"

    return check


@pytest.fixture(scope="session")
def build() -> Callable[..., GraphModule]:
    """build(function, x=tensor, ...): the graph of a function written in ATen calls, with `val` on every node."""

    def build(function: Callable[..., tuple[Tensor, ...]], **examples: Tensor) -> GraphModule:
        graph_module = symbolic_trace(function)
        FakeTensorProp(graph_module).propagate(*examples.values())
        return graph_module

    return build


@pytest.fixture(scope="session")
def run() -> Callable[..., tuple[Tensor, ...]]:
    """run(graph_module, x=tensor, ...): its outputs, inputs bound by name; more inputs than it takes are allowed."""

    def run(graph_module: GraphModule, **values: Tensor) -> tuple[Tensor, ...]:
        graph_module.graph.lint()
        graph_module.recompile()
        names = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
        with torch.no_grad():
            return graph_module(*(values[name] for name in names))

    return run


@dataclass(frozen=True)
class Denoiser:
    """A tiny module, one call of it, and its capture."""

    module: nn.Module
    call: Call
    captured: Captured

    def graph(self) -> GraphModule:
        """A fresh copy of the captured graph, free to edit."""
        graph = Graph()
        graph.output(graph.graph_copy(self.captured.graph_module.graph, {}))
        return GraphModule(self.captured.graph_module, graph)

    def values(self, *arguments: Any) -> dict[str, Tensor]:
        """Every graph input by name for a call with other arguments, or for the recorded one."""
        call = bind(self.module, arguments, {}, frozenset()) if arguments else self.call
        return self.captured.bindings(call)


def _denoiser(module: nn.Module, *arguments: Tensor) -> Denoiser:
    module.eval().requires_grad_(False)
    call = bind(module, arguments, {}, frozenset())
    captured = capture(module, call)
    assert captured.problem is None, captured.problem
    return Denoiser(module, call, captured)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.linear(x) * t


class Stack(nn.Module):
    """Two residual blocks and a head: values `add` and `add_1` leave the blocks, `x` enters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None]
        for block in self.blocks:
            x = block(x, t)
        return self.head(x)


class _GatedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.gates = nn.Linear(8, 16)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        gate, gate_mlp = self.gates(emb)[:, None].chunk(2, dim=-1)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * attention
        return x + gate_mlp * self.mlp(self.norm(x))


class Transformer(nn.Module):
    """Two gated blocks of attention and MLP between an embedder and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.time = nn.ModuleList([nn.Linear(1, 8)])  # numbered, but under 2% of the FLOPs: no block
        self.blocks = nn.ModuleList([_GatedBlock(), _GatedBlock()])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, emb = self.embed(x), self.time[0](t[:, None])
        for block in self.blocks:
            x = block(x, emb)
        return self.head(x)


@pytest.fixture(scope="session")
def stack() -> Denoiser:
    torch.manual_seed(0)
    return _denoiser(Stack(), torch.randn(2, 5, 8), torch.rand(2))


@pytest.fixture(scope="session")
def transformer() -> Denoiser:
    torch.manual_seed(0)
    return _denoiser(Transformer(), torch.randn(2, 6, 4), torch.rand(2))
