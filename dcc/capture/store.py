"""Captured graphs on disk: an export takes two milliseconds per operator, reading a graph a tenth of a second."""

from __future__ import annotations

import functools
import getpass
import hashlib
import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from dcc import passes
from dcc.capture.captured import Answers, Captured, fixed_or_symbol, gives_all, weights_of
from dcc.capture.graph_file import read_graph, write_graph
from dcc.capture.watch import lasting_digest
from dcc.errors import CaptureError
from dcc.passes.graph import nodes_by_name, shape
from dcc.passes.verify import verify
from dcc.record.call import Call
from dcc.record.fingerprint import code_hash
from dcc.text import error_line
from dcc.torch_internals import pytree

STORED = 64  # graphs kept on disk; the oldest are deleted


def place(module: nn.Module, call: Call) -> Path | None:
    """The file of the graph for this code and call in DCC_CACHE_DIR, by default in Inductor's own cache folder.

    None where that variable is set, but empty.
    """
    folder = os.environ.get("DCC_CACHE_DIR")
    if folder == "":
        return None
    own = [torch.__version__, _sources(), code_hash(module), lasting_digest(module), call.signature, *call.shapes]
    name = hashlib.sha256("\n".join(map(str, own)).encode()).hexdigest()[:32]
    beside = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
    return Path(folder or f"{beside}/dcc") / f"{name}.graph"


@functools.cache
def _sources() -> str:
    """The source of all of dcc that shapes a captured graph: this folder, the calls it binds and the passes it uses."""
    here = Path(__file__).parent
    beside = [here.parent / "record" / "call.py", here.parent / "torch_internals.py"]
    files = [*here.glob("*.py"), *beside, *Path(passes.__path__[0]).glob("*.py")]
    return "\n".join(file.read_text() for file in sorted(files))


def read(path: Path | None, module: nn.Module, call: Call, tests: Answers) -> tuple[Captured | None, str]:
    """The stored graph, or None and the reason why the one on disk is of no use; no reason where there is none."""
    if path is None or not path.exists():
        return None, ""
    try:
        graph_module, facts, constants = read_graph(path)
        verify(graph_module, "reading a stored graph")
        inputs, nodes = facts["inputs"], nodes_by_name(graph_module)
        captured = Captured(
            graph_module,
            call,
            weights_of(module, facts["weights"]),
            constants,
            inputs,
            pytree.treespec_loads(facts["outputs"]),
            origin="read from disk",
            _symbols={name: [fixed_or_symbol(size) for size in shape(nodes[inputs[name]])] for name in inputs},
        )
    except Exception as error:  # cut short, foreign, or of another version of torch's own internals
        return None, f"cannot be read: {error_line(error)}"
    if not captured.accepts(call) or not gives_all(captured, tests):
        return None, "gives other values than the module"
    return captured, ""


def write(path: Path | None, captured: Captured) -> str:
    """Keeps the graph for later processes. Returns why it cannot be kept, or an empty text."""
    if path is None or captured.problem is not None:
        return ""
    try:
        facts = {
            "inputs": captured.inputs,
            "weights": {name: weight.path for name, weight in captured.weights.items()},
            "outputs": pytree.treespec_dumps(captured.out_spec),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_graph(path, captured.graph_module.graph, facts, captured.constants)
        stored = sorted(path.parent.glob("*.graph"), key=lambda file: file.stat().st_mtime)
        for file in stored[:-STORED]:
            file.unlink(missing_ok=True)
    except (CaptureError, OSError, NotImplementedError) as error:  # the last: outputs of a class that has no name
        return f", not kept on disk: {error_line(error)}"
    return ""
