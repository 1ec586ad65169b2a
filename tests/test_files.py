"""Files are written whole or not at all, by any number of writers at once, and read without waiting for anything."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.fx import Graph

from dcc import files
from dcc.capture.graph_file import read_graph, write_graph
from dcc.errors import CaptureError, DccError, PlanError
from dcc.files import parse_json, read_bytes, read_text, write_file
from dcc.measure.profile import Profile
from dcc.plans.plan import Plan

from .test_plan import planned
from .test_profile import synthetic


def test_bytes_and_text_come_back(tmp_path):
    path = tmp_path / "file"
    write_file(path, b"\x00\xff")
    assert read_bytes(path, DccError) == b"\x00\xff"
    write_file(str(path), "é\n")
    assert read_text(path, DccError) == "é\n" and os.listdir(tmp_path) == ["file"]


def test_a_new_file_has_the_rights_that_the_user_wants(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_part(tmp_path, monkeypatch, step):
    write_file(tmp_path / "file", "old")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="no space left"):
        write_file(tmp_path / "file", "new")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_data_are_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(("fsync", os.fstat(file).st_size)) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(("replace", Path(a).stat().st_size)) or rename(a, b))
    write_file(tmp_path / "file", "12345")
    assert done == [("fsync", 5), ("replace", 5)]


def test_a_link_that_waits_at_the_place_of_a_part_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "guessed")
    (tmp_path / ".dcc-guessed.part").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", "new")
    assert (tmp_path / "precious").read_text() == "mine"


def test_every_writer_of_dcc_goes_this_way():
    """No file of dcc opens another for writing by other means."""
    root = Path(files.__file__).parent
    sources = [path for folder in (root, root / "passes", root / "kernels") for path in folder.resolve().rglob("*.py")]
    ways = ("write_text(", "write_bytes(", "save_file(", 'open("w', ', "w")', ', "wb")', "torch.save(", "savefig(path")
    found = {path.name for path in sources if any(way in path.read_text() for way in ways)}
    assert found == {"files.py"} and len(sources) > 90


def test_large_files_and_what_grows_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x" * 11)
    with pytest.raises(PlanError, match=r"file: cannot be read: it has 11 bytes, more than the 10"):
        read_bytes(tmp_path / "file", PlanError, most=10)
    assert read_bytes(tmp_path / "file", PlanError, most=11) == b"x" * 11
    monkeypatch.setattr(files, "check_regular", lambda *_: None)  # the file grows between the look and the read
    with pytest.raises(PlanError, match="more than the 10 bytes"):
        read_bytes(tmp_path / "file", PlanError, most=10)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
        ("[" * 33 + "]" * 33, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('"\\ud800"', "not JSON as dcc writes it"),
        ('{"\\udfff": 1}', "not JSON as dcc writes it"),
        ("9" * 5000, "not JSON as dcc writes it"),
        ("{", "not JSON as dcc writes it"),
    ],
    ids=["twice", "33 levels", "endless", "half a pair", "half a pair in a name", "5000 digits", "cut"],
)
def test_json_that_is_refused(text, problem):
    with pytest.raises(PlanError, match=f"here is .*{problem}"):
        parse_json(text, "here", PlanError)


def test_json_that_is_good():
    data = {"a": [1, 2.5, None, True, "é", {"b": []}], "c": 2**70}
    assert parse_json(json.dumps(data), "here", PlanError) == data
    assert parse_json("[" * 32 + "]" * 32, "here", PlanError)


# --- Many writers and readers of one file ---------------------------------------------------------------------------


def graph_of(size):
    graph = Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (x, size)),))
    return graph


def save_and_load(folder: Path, writer: int, rounds: int) -> int:
    """Saves and loads a plan, a profile and a graph that others save too; how many it loaded as somebody wrote them."""
    torch.manual_seed(0)
    features = torch.randn(1, 3, 6, 10)
    whole = 0
    for turn in range(rounds):
        number = 1000 * writer + turn
        planned(parameters={"writer": number, "text": "x" * (number % 7) * 1000}).save(folder / "plan.json")
        parameters = Plan.load(folder / "plan.json").parameters
        whole += len(parameters["text"]) == parameters["writer"] % 7 * 1000
        synthetic(features * (writer + 1), seed=number, settings={"writer": writer}).save(folder / "profile")
        profile = Profile.load(folder / "profile")
        whole += torch.allclose(profile.gram, synthetic(features * (profile.settings["writer"] + 1)).gram)
        write_graph(folder / "graph", graph_of(number), {"writer": number}, {"c": torch.full((50,), number)})
        graph, facts, constants = read_graph(folder / "graph")
        (node,) = [node for node in graph.graph.nodes if node.op == "call_function"]
        whole += node.args[1] == facts["writer"] and bool((constants["c"] == facts["writer"]).all())
    return whole


def counted(folder: str, writer: int, rounds: int, results: multiprocessing.Queue) -> None:
    results.put(save_and_load(Path(folder), writer, rounds))


def in_threads(folder: Path, writers: int, rounds: int) -> int:
    found, threads = [], []
    for writer in range(writers):
        run = threading.Thread(target=lambda writer=writer: found.append(save_and_load(folder, writer, rounds)))
        threads.append(run)
        run.start()
    for run in threads:
        run.join()
    assert len(found) == writers  # no thread ended in an error
    return sum(found)


def in_processes(folder: Path, writers: int, rounds: int) -> int:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    started = [context.Process(target=counted, args=(str(folder), w, rounds, results)) for w in range(writers)]
    for process in started:
        process.start()
    found = [results.get(timeout=300) for _ in started]
    for process in started:
        process.join()
    return sum(found)


def test_eight_threads_saving_and_loading_find_whole_files_only(tmp_path):
    assert in_threads(tmp_path, 8, 5) == 3 * 8 * 5
    assert sorted(os.listdir(tmp_path)) == ["graph", "plan.json", "profile"]


@pytest.mark.long
def test_eight_threads_and_four_processes_a_thousand_times(tmp_path):
    assert in_threads(tmp_path, 8, 25) + in_processes(tmp_path, 4, 34) == 3 * (8 * 25 + 4 * 34)
    assert sorted(os.listdir(tmp_path)) == ["graph", "plan.json", "profile"]


def test_a_reader_that_meets_a_part_of_a_file_says_so(tmp_path):
    """What the others find whole is what they would refuse in part: the check above can fail."""
    save_and_load(tmp_path, 1, 1)
    for name, load, refused in (("plan.json", Plan.load, PlanError), ("graph", read_graph, CaptureError)):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        begun = time.perf_counter()
        with pytest.raises(refused):
            load(tmp_path / name)
        assert time.perf_counter() - begun < 1
