"""Captured graphs on disk: an export takes two milliseconds per operator, reading a graph a tenth of a second.

Nothing here ever makes a capture fail: where a graph cannot be read or kept, the reason becomes part of its `origin`.
"""

from __future__ import annotations

import functools
import getpass
import hashlib
import os
import re
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dcc import passes
from dcc.capture.captured import Answers, Captured, fixed_or_symbol, gives_all, weights_of
from dcc.capture.graph_file import read_graph, write_graph
from dcc.capture.watch import lasting_digest
from dcc.errors import CaptureError
from dcc.passes.graph import nodes_by_name, returned, shape
from dcc.passes.verify import verify
from dcc.record.call import Call
from dcc.record.fingerprint import code_hash
from dcc.text import error_line
from dcc.torch_internals import tree_from_json, tree_to_json

STORED = 64  # graphs kept on disk; the oldest are deleted
LEFT_OVER = 3600.0  # seconds after which a half-written file is that of a process that was killed


@dataclass(frozen=True)
class Place:
    """Where a graph is kept: a file, or None where it is not kept, with the reason unless that is what is wished."""

    path: Path | None
    problem: str = ""


def place(module: nn.Module, call: Call) -> Place:
    """The file of the graph for this code and call in DCC_CACHE_DIR, by default in Inductor's own cache folder.

    There is none where that variable is set, but empty, or where anything stands in the way.
    """
    folder = os.environ.get("DCC_CACHE_DIR")
    if folder == "":
        return Place(None)
    try:
        own = [torch.__version__, _sources(), code_hash(module), lasting_digest(module), call.signature, *call.shapes]
        name = hashlib.sha256("\n".join(map(str, own)).encode()).hexdigest()[:32]
        path = Path(folder or f"{_beside()}/dcc").absolute() / f"{name}.graph"
        _make_own(path.parent)
    except Exception as error:  # sources that are gone, modules that cannot be printed, folders that are not ours
        return Place(None, error_line(error))
    return Place(path)


def _beside() -> str:
    """Inductor's cache folder, by the rule that Inductor has for it."""
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return folder
    try:
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (OSError, KeyError, ImportError):  # a user that has no name, as in many containers
        user = str(os.getuid())
    return f"{tempfile.gettempdir()}/torchinductor_{user}"


def _make_own(folder: Path) -> None:
    """Makes the folder for this user alone. Raises CaptureError where another user could have put files there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise CaptureError(f"{folder} is a link, no folder")
    if found.st_uid != os.geteuid():
        raise CaptureError(f"{folder} belongs to another user")
    if found.st_mode & 0o022:
        raise CaptureError(f"{folder} can be written by other users; take that right away: chmod go-w")
    trusted = {0, os.geteuid(), Path("/").stat().st_uid}
    for path in (*folder.parents, *folder.resolve().parents):
        found = path.lstat()
        shared = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX and not stat.S_ISLNK(found.st_mode)
        if found.st_uid not in trusted or shared:
            raise CaptureError(f"{path}, in which {folder} lies, can be changed by other users")


@functools.cache
def _sources() -> str:
    """The source of all of dcc that shapes a captured graph: this folder, the calls it binds and the passes it uses."""
    here = Path(__file__).parent
    beside = [here.parent / name for name in ("record/call.py", "torch_internals.py", "tensor_file.py")]
    files = [*here.glob("*.py"), *beside, *Path(passes.__path__[0]).glob("*.py")]
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(files))


def read(place: Place, module: nn.Module, call: Call, tests: Answers) -> tuple[Captured | None, str]:
    """The stored graph, or None and the reason why the one on disk is of no use; no reason where there is none."""
    path = place.path
    try:
        if path is None or not path.exists():
            return None, ""
        captured = _read(path, module, call)
        if not captured.accepts(call) or not gives_all(captured, tests):
            return None, "gives other values than the module"
    except Exception as error:  # cut short, foreign, or of another version of torch's own internals
        return None, f"cannot be read: {error_line(error)}"
    return captured, ""


def _read(path: Path, module: nn.Module, call: Call) -> Captured:
    graph_module, facts, constants = read_graph(path)
    verify(graph_module, "reading a stored graph")
    inputs, weights, outputs = (facts.get(name) for name in ("inputs", "weights", "outputs"))
    if set(facts) != {"inputs", "weights", "outputs"} or not isinstance(inputs, dict) or not isinstance(weights, dict):
        raise CaptureError(f"{path}: field 'facts' must hold inputs, weights and outputs")
    held = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    known = {name for name, _ in held}
    if foreign := [target for target in weights.values() if target not in known]:
        raise CaptureError(f"{path}: the module has no weight {foreign[0]!r:.80}")
    if foreign := [name for name in inputs if name not in call.names]:
        raise CaptureError(f"{path}: the call has no tensor {foreign[0]!r:.80}")
    nodes = nodes_by_name(graph_module)
    taken = sorted(node.name for node in nodes.values() if node.op == "placeholder")
    if taken != sorted([*inputs.values(), *weights, *constants]):
        raise CaptureError(f"{path}: the graph's inputs are not those of the facts, each once")
    return Captured(
        graph_module,
        call,
        weights_of(module, weights),
        constants,
        inputs,
        tree_from_json(outputs, len(returned(graph_module))),
        origin="read from disk",
        _symbols={name: [fixed_or_symbol(size) for size in shape(nodes[inputs[name]])] for name in inputs},
    )


def write(place: Place, captured: Captured) -> str:
    """Keeps the graph for later processes. Returns why it cannot be kept, or an empty text."""
    if captured.problem is not None:
        return ""
    if place.path is None:
        return place.problem and f", not kept on disk: {place.problem}"
    try:
        facts = {
            "inputs": captured.inputs,
            "weights": {name: weight.path for name, weight in captured.weights.items()},
            "outputs": tree_to_json(captured.out_spec),
        }
        write_graph(place.path, captured.graph_module.graph, facts, captured.constants)
        _tidy(place.path)
    except Exception as error:  # a full disk, or what a file cannot hold
        return f", not kept on disk: {error_line(error)}"
    return ""


def _tidy(written: Path) -> None:
    """Deletes the oldest graphs beyond STORED, never the one just written, and what killed processes left."""
    now, ages = time.time(), []
    for path in written.parent.iterdir():
        try:
            age = now - path.lstat().st_mtime
        except FileNotFoundError:  # another process tidies too
            continue
        if path.name.startswith(".dcc-") and path.suffix == ".part" and abs(age) > LEFT_OVER:
            path.unlink(missing_ok=True)
        if path.suffix == ".graph" and path != written:
            ages.append((age if age >= 0 else float("inf"), path))  # a time to come says nothing: it goes first
    for _, path in sorted(ages)[STORED - 1 :]:
        path.unlink(missing_ok=True)
