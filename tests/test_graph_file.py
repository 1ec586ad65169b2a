"""Graphs on disk: read again as they were, refused where they no longer fit, and never a reason to fail."""

import math
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.fx import Graph

from dcc.capture.export import _CAPTURES, capture
from dcc.capture.graph_file import read_graph, write_graph
from dcc.capture.store import STORED
from dcc.errors import CaptureError
from dcc.record.call import bind


class Pooled(nn.Module):
    """Sizes of several kinds, a constant, a list of outputs and a setting that no weight shows."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), scale

    def forward(self, x, timestep, ids):
        first, last = self.linear(x).chunk(2, dim=-1)
        table = torch.tensor([0.5, 2.0, 1.0, 3.0])
        tokens = x.shape[1] + ids.shape[0]
        padded = torch.cat([first, last.new_zeros(x.shape[0], tokens - x.shape[1], 4)], 1)
        return padded * table * self.scale + timestep[:, None, None], ids.reshape(-1, 1).expand(-1, tokens // 2)


def call_of(module, batch=2, tokens=5, ids=6):
    return bind(module, (torch.randn(batch, tokens, 8), torch.rand(batch), torch.arange(ids)), {}, frozenset())


def again(module, call):
    """The capture that another process would make."""
    _CAPTURES.pop(module, None)
    return capture(module, call)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Graphs of one test are kept for that test."""
    monkeypatch.setenv("DCC_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def module():
    return Pooled().eval().requires_grad_(False)


def test_a_graph_comes_back_as_it_was(module):
    call = call_of(module)
    first, second = again(module, call), again(module, call)
    assert (first.origin, second.origin) == ("exported", "read from disk")
    pairs = list(zip(first.graph_module.graph.nodes, second.graph_module.graph.nodes, strict=True))
    assert all((a.op, a.name, a.target) == (b.op, b.name, b.target) and str(a.args) == str(b.args) for a, b in pairs)
    assert first.inputs == second.inputs and list(first.weights) == list(second.weights)
    for batch, tokens, ids in ((2, 5, 6), (3, 7, 4)):
        other = call_of(module, batch, tokens, ids)
        assert second.accepts(other) and second.agrees(module, other)
    assert not second.accepts(bind(module, (torch.randn(2, 5, 8), torch.rand(3), torch.arange(6)), {}, frozenset()))


def test_weights_of_a_stored_graph_are_live(module):
    call = call_of(module)
    again(module, call)
    stored = again(module, call)
    module.linear.weight.data.mul_(2)
    assert stored.agrees(module, call)


def test_every_setting_has_a_graph_of_its_own(module):
    call = call_of(module)
    again(module, call)
    before, module.scale = module.scale, 1.5
    assert again(module, call).origin == "exported"
    assert again(module, call).origin == "read from disk"
    module.scale = before
    assert again(module, call).origin == "read from disk"


@pytest.mark.parametrize("damage", ["cut", "foreign", "format"])
def test_a_damaged_file_is_named_and_written_anew(module, folder, damage):
    call = call_of(module)
    again(module, call)
    (path,) = folder.iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "foreign":
        path.write_text("no graph")
    else:
        save_file({}, path, metadata={"dcc_graph": "99"})
    found = again(module, call)
    assert found.origin.startswith("exported, because the graph on disk cannot be read: ") and found.problem is None
    assert again(module, call).origin == "read from disk"


def test_a_folder_that_cannot_be_written_is_said(module, monkeypatch, folder):
    (folder / "file").write_text("")
    monkeypatch.setenv("DCC_CACHE_DIR", str(folder / "file" / "below"))
    assert again(module, call_of(module)).origin.startswith("exported, not kept on disk: ")


def test_an_empty_variable_keeps_nothing(module, monkeypatch, folder):
    monkeypatch.setenv("DCC_CACHE_DIR", "")
    assert again(module, call_of(module)).origin == "exported" and not list(folder.iterdir())


def test_the_default_folder_lies_beside_what_inductor_keeps(module, monkeypatch, folder):
    monkeypatch.delenv("DCC_CACHE_DIR")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    again(module, call_of(module))
    assert len(list((folder / "inductor" / "dcc").glob("*.graph"))) == 1


def test_the_oldest_graphs_give_way(module, folder):
    for index in range(STORED + 5):
        path = folder / f"{index:03}.graph"
        path.write_text("")
        os.utime(path, (index, index))
    again(module, call_of(module))
    names = {path.name for path in folder.glob("*.graph")}
    assert len(names) == STORED and "005.graph" not in names and f"{STORED + 4:03}.graph" in names


@pytest.mark.parametrize("target", [print, len, os.getcwd, torch.load])
def test_a_call_that_is_no_operator_is_refused_by_node(folder, target):
    graph = Graph()
    graph.output((graph.call_function(target, ()),))
    with pytest.raises(CaptureError, match=r"node '\w+': a file cannot hold a call of"):
        write_graph(folder / "graph", graph, {}, {})
    assert not list(folder.iterdir())


def test_arguments_of_every_kind(folder):
    graph = Graph()
    x = graph.placeholder("x")
    arguments = (x, [1, -math.inf, None], (True, "text"), torch.float16, torch.device("cpu"), torch.strided)
    made = graph.call_function(torch.ops.aten.clone.default, arguments, {"memory_format": torch.channels_last})
    graph.output((made,))
    write_graph(folder / "graph", graph, {"a": [1]}, {"constant": torch.arange(3)})
    found, facts, constants = read_graph(folder / "graph")
    (node,) = [node for node in found.graph.nodes if node.op == "call_function"]
    assert str(node.args) == str(made.args) and node.kwargs == made.kwargs and type(node.args[2]) is tuple
    assert facts == {"a": [1]} and torch.equal(constants["constant"], torch.arange(3))
    with safe_open(folder / "graph", framework="pt") as file:
        assert "aten.clone.default" in file.metadata()["header"]
