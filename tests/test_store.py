"""Where captured graphs are kept: a folder of the user's own, and nothing about it makes a capture fail."""

import getpass
import os
import shutil
import stat
import sys
import time

import pytest
import torch
from torch import nn

from dcc.capture import store
from dcc.capture.export import _CAPTURES, capture
from dcc.capture.purity import examine
from dcc.record.call import bind


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return {"a": self.linear(x), "b": [x.sin(), (x + 1,)]}


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def call(module):
    return bind(module, (torch.randn(2, 4),), {}, frozenset())


@pytest.fixture(scope="module")
def captured(module, call):
    """The capture of a process that keeps nothing on disk; exporting once is enough for all tests."""
    return capture(module, call)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DCC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(module, call, captured):
    """Why the graph cannot be kept, and how it is read again: its origin, or the reason why not."""
    place = store.place(module, call)
    said = store.write(place, captured)
    found, why_not = store.read(place, module, call, examine(module, call).answers)
    return said, found.origin if found else why_not


def test_the_folder_is_made_for_this_user_alone(folder, module, call, captured):
    before = os.umask(0)
    try:
        assert kept(module, call, captured) == ("", "read from disk")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_outputs_come_back_in_their_structure(folder, module, call, captured):
    place = store.place(module, call)
    assert store.write(place, captured) == ""
    found, _ = store.read(place, module, call, examine(module, call).answers)
    assert found is not None and found.out_spec == captured.out_spec


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_not_used(folder, module, call, captured, mode):
    assert kept(module, call, captured)[0] == ""
    folder.chmod(mode)
    said, why_not = kept(module, call, captured)
    assert said.startswith(", not kept on disk: CaptureError: ") and "can be written by other users" in said
    assert why_not == ""  # what lies there is not even looked at
    folder.chmod(0o755)  # readable, but nobody else can put a file there
    assert kept(module, call, captured) == ("", "read from disk")


def test_a_folder_of_another_user_is_not_used(folder, module, call, captured, monkeypatch):
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert "belongs to another user" in kept(module, call, captured)[0]


def test_a_link_is_no_folder(folder, module, call, captured):
    folder.with_name("elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.with_name("elsewhere"))
    assert "is a link, no folder" in kept(module, call, captured)[0]
    assert not list(folder.iterdir())


def test_a_folder_in_one_that_others_can_change_is_not_used(folder, module, call, captured):
    folder.mkdir(mode=0o700)
    folder.parent.chmod(0o777)
    assert "can be changed by other users" in kept(module, call, captured)[0]
    folder.parent.chmod(0o1777)  # as /tmp is: others may add files, but not move ours
    assert kept(module, call, captured) == ("", "read from disk")


def test_links_on_the_way_are_followed_where_they_are_ours(folder, module, call, captured, monkeypatch):
    folder.with_name("disk").mkdir()
    folder.with_name("home").symlink_to(folder.with_name("disk"))
    monkeypatch.setenv("DCC_CACHE_DIR", str(folder.with_name("home") / "cache"))
    assert kept(module, call, captured) == ("", "read from disk")


def test_a_file_at_the_place_of_the_folder(folder, module, call, captured):
    folder.write_text("")
    assert kept(module, call, captured)[0].startswith(", not kept on disk: FileExistsError")


def test_a_user_without_a_name(module, call, captured, monkeypatch, tmp_path):
    def nameless():
        raise KeyError("uid not found")

    monkeypatch.delenv("DCC_CACHE_DIR")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(getpass, "getuser", nameless)
    monkeypatch.setattr(store.tempfile, "gettempdir", lambda: str(tmp_path))
    assert kept(module, call, captured) == ("", "read from disk")
    assert (tmp_path / f"torchinductor_{os.getuid()}" / "dcc").is_dir()
    monkeypatch.setattr(getpass, "getuser", lambda: "../../etc")
    assert store.place(module, call).path.is_relative_to(tmp_path)


@pytest.mark.parametrize("error", [PermissionError("no"), OSError(28, "No space left on device"), ValueError("odd")])
@pytest.mark.parametrize("name", ["write_graph", "_tidy"])
def test_any_error_of_a_write_is_said(folder, module, call, captured, monkeypatch, name, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(store, name, fails)
    assert kept(module, call, captured)[0].startswith(f", not kept on disk: {type(error).__name__}")


def test_a_folder_that_cannot_be_looked_into(folder, module, call, captured, monkeypatch):
    place = store.place(module, call)
    assert store.write(place, captured) == ""

    def forbidden(*_, **__):
        raise PermissionError("no way in")

    monkeypatch.setattr(type(place.path), "exists", forbidden)
    assert store.read(place, module, call, examine(module, call).answers) == (
        None,
        "cannot be read: PermissionError: no way in",
    )


def test_a_disk_that_is_full(folder, module, call, captured, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    place = store.place(module, call)
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in store.write(place, captured)
    assert not list(folder.iterdir())


def test_sources_that_are_not_on_disk(folder, module, call, captured, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "__file__", "/nowhere/model.py")
    said, why_not = kept(module, call, captured)
    assert said.startswith(", not kept on disk: FileNotFoundError") and why_not == "" and not folder.exists()


def test_a_module_that_cannot_be_printed(folder, captured):
    class Silent(Net):
        def extra_repr(self):
            raise RuntimeError("has no name")

    module = Silent()
    place = store.place(module, bind(module, (torch.randn(2, 4),), {}, frozenset()))
    assert place == store.Place(None, "RuntimeError: has no name")


def test_the_reason_is_part_of_the_origin(folder, module, call):
    folder.write_text("")
    _CAPTURES.pop(module, None)
    found = capture(module, call)
    assert found.problem is None and found.origin.startswith("exported, not kept on disk: FileExistsError")


def test_graphs_of_a_time_to_come_go_first_and_the_new_one_stays(folder, module, call, captured):
    folder.mkdir(mode=0o700)
    for index in range(store.STORED + 5):
        path = folder / f"{index:03}.graph"
        path.write_text("")
        os.utime(path, (time.time() + 10**6 + index,) * 2 if index < 40 else (1000 + index,) * 2)
    assert kept(module, call, captured) == ("", "read from disk")
    left = sorted(path.name for path in folder.glob("*.graph"))
    assert len(left) == store.STORED and store.place(module, call).path.name in left
    assert all(f"{index:03}.graph" in left for index in range(40, store.STORED + 5))


def test_what_killed_processes_left_is_deleted(folder, module, call, captured):
    folder.mkdir(mode=0o700)
    for name, age in ((".dcc-old.part", 2 * store.LEFT_OVER), (".dcc-new.part", 1), ("mine.part", 10**6)):
        (folder / name).write_text("")
        os.utime(folder / name, (time.time() - age,) * 2)
    assert store.write(store.place(module, call), captured) == ""
    names = {path.name for path in folder.iterdir() if path.suffix == ".part"}
    assert names == {".dcc-new.part", "mine.part"}


def test_a_folder_that_is_gone_in_between(folder, module, call, captured):
    place = store.place(module, call)
    shutil.rmtree(folder)
    assert store.read(place, module, call, examine(module, call).answers) == (None, "")
    assert store.write(place, captured).startswith(", not kept on disk: FileNotFoundError")


@pytest.mark.parametrize("other", ["linear", "__class__", "forward.__func__", "linear.weight.data", "nothing"])
def test_a_weight_must_be_one_of_the_module(folder, module, call, captured, other):
    place = store.place(module, call)
    names = list(captured.weights)
    facts = {"inputs": captured.inputs, "weights": dict.fromkeys(names, other), "outputs": {"tuple": [0, 1, 2]}}
    store.write_graph(place.path, captured.graph_module.graph, facts, captured.constants)
    found, why_not = store.read(place, module, call, examine(module, call).answers)
    assert found is None and f"the module has no weight {other!r}" in why_not
