"""The observer: DCC_* variables, output, dumps, order and broken passes."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from dcc.errors import OptionError, PassError
from dcc.passes.base import Pass, Port, Site
from dcc.passes.graph import nodes_by_name, output_node
from dcc.passes.text import text
from dcc.variants.observe import Observer, Options, check_order

from .rows import ROW_PASSES as PASSES
from .rows import row_of

NAMES = [pass_.name for pass_ in PASSES]
ROW = row_of(forecast=((Site("stack", "residual", (Port("add_1", "x"),)),),), anchors=1)


def run_all(stack, row=ROW, **options):
    observer = Observer(Options(**options))
    graph_module = stack.graph()
    observer.run_all(graph_module, row, "row0")
    return observer, graph_module


def upto(name):
    """The names of the passes up to and with the named one."""
    return NAMES[: NAMES.index(name) + 1]


def test_every_pass_runs_once_in_order(stack):
    observer, _ = run_all(stack)
    assert [(variant, name) for variant, name, _, _ in observer.records] == [("row0", name) for name in NAMES]
    assert all(seconds >= 0 for _, _, seconds, _ in observer.records)
    edits = {name: edits for _, name, _, edits in observer.records}
    assert {name: n for name, n in edits.items() if n} == {
        "insert_cache_reads": 1,
        "insert_forecasts": 1,
        "drop_dead_nodes": 14,
    }


def test_the_code_follows_the_graph(stack):
    _, graph_module = run_all(stack)
    assert "anchor_stack_0_0" in graph_module.code


def test_silent_by_default(stack, capsys):
    run_all(stack)
    assert capsys.readouterr() == ("", "")


def test_debug_one_prints_a_line_a_pass(stack, capsys):
    run_all(stack, debug=1)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == len(NAMES)
    reads = lines[NAMES.index("insert_cache_reads")]
    assert reads.startswith("dcc row0 insert_cache_reads: 1 edits, ")
    assert reads.endswith(" s")


def test_debug_two_adds_the_changed_lines(stack, capsys):
    run_all(stack, debug=2)
    lines = capsys.readouterr().err.splitlines()
    added = [line for line in lines if line.startswith("+%")]
    assert any("combine.reference" in line for line in added)
    assert any(line.startswith("-%") for line in lines)
    assert lines[1].startswith(f"dcc row0 {NAMES[1]}")  # no diff where nothing changed


def test_debug_three_prints_the_whole_text(stack, capsys):
    _, graph_module = run_all(stack, debug=3)
    err = capsys.readouterr().err
    assert err.count("\nreturn (") == len(NAMES)
    assert text(graph_module) in err


def test_dump_writes_one_file_a_pass(stack, tmp_path):
    folder = tmp_path / "deep" / "dump"
    _, graph_module = run_all(stack, dump=folder)
    names = [f"row0_{index:02d}_{name}.txt" for index, name in enumerate(NAMES)]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / names[0]).read_text() == text(stack.graph())
    assert (folder / names[-1]).read_text() == text(graph_module)


def test_until_stops_after_the_named_pass(stack):
    observer, _ = run_all(stack, until="insert_cache_reads")
    assert [name for _, name, _, _ in observer.records] == upto("insert_cache_reads")


def test_skip_leaves_passes_out(stack):
    observer, graph_module = run_all(stack, skip=frozenset({"drop_dead_nodes", "insert_forecasts"}))
    assert [name for _, name, _, _ in observer.records] == [
        name for name in NAMES if name not in ("drop_dead_nodes", "insert_forecasts")
    ]
    assert "add" in nodes_by_name(graph_module)


@pytest.mark.parametrize("skipped", ["drop_asserts", "insert_forecasts", "drop_dead_nodes"])
def test_a_skipped_optional_pass_changes_no_number(stack, run, skipped):
    x, t = torch.randn(3, 4, 8), torch.rand(3)
    values = stack.values(x, t) | {"anchor_stack_0_0": torch.randn(3, 4, 8), "coefficients": torch.ones(1, 3, 1)}
    (expected,) = run(run_all(stack)[1], **values)
    (found,) = run(run_all(stack, skip=frozenset({skipped}))[1], **values)
    assert torch.equal(found, expected)


def test_until_a_skipped_pass_still_stops(stack):
    observer, _ = run_all(stack, until="insert_forecasts", skip=frozenset({"insert_forecasts"}))
    assert [name for _, name, _, _ in observer.records] == upto("insert_forecasts")[:-1]


def test_options_from_the_environment(monkeypatch):
    assert Options.from_env() == Options()
    monkeypatch.setenv("DCC_DEBUG", "2")
    monkeypatch.setenv("DCC_DUMP", "some/folder")
    monkeypatch.setenv("DCC_UNTIL", "insert_forecasts")
    monkeypatch.setenv("DCC_SKIP", "drop_asserts,drop_dead_nodes")
    expected = Options(2, Path("some/folder"), "insert_forecasts", frozenset({"drop_asserts", "drop_dead_nodes"}))
    assert Options.from_env() == expected
    assert Observer().options == expected


def test_empty_variables_are_unset_ones(monkeypatch):
    for name in ("DCC_DEBUG", "DCC_DUMP", "DCC_UNTIL", "DCC_SKIP"):
        monkeypatch.setenv(name, "")
    assert Options.from_env() == Options()


@pytest.mark.parametrize("value", ["4", "-1", "yes", "1.0"])
def test_bad_debug_lists_the_levels(monkeypatch, value):
    monkeypatch.setenv("DCC_DEBUG", value)
    with pytest.raises(OptionError, match=rf"DCC_DEBUG='{value}'.*0, 1, 2 or 3"):
        Options.from_env()


def test_bad_until_lists_the_passes(monkeypatch):
    monkeypatch.setenv("DCC_UNTIL", "nothing")
    with pytest.raises(OptionError, match=f"DCC_UNTIL='nothing'.*{', '.join(NAMES)}"):
        Options.from_env()


@pytest.mark.parametrize("value", ["insert_cache_writes", "drop_asserts,nothing"])
def test_bad_skip_lists_the_optional_passes(monkeypatch, value):
    monkeypatch.setenv("DCC_SKIP", value)
    optional = "drop_asserts, insert_forecasts, hoist_invariants, drop_dead_nodes"
    with pytest.raises(OptionError, match=rf"DCC_SKIP=.*: {optional}"):
        Options.from_env()


class LoseOutput(Pass):
    name: ClassVar[str] = "lose_output"

    def apply(self, graph_module, row):
        output = output_node(graph_module)
        output.args = (output.args[0][0],)
        return 1


class LoseValue(Pass):
    name: ClassVar[str] = "lose_value"

    def apply(self, graph_module, row):
        del nodes_by_name(graph_module)["add"].meta["val"]
        return 1


@pytest.mark.parametrize("broken", [LoseOutput(), LoseValue()], ids=lambda pass_: pass_.name)
def test_a_pass_that_breaks_the_graph_is_named(stack, broken):
    observer = Observer(Options())
    with pytest.raises(PassError, match=f"^{broken.name}: "):
        observer.run_all(stack.graph(), ROW, "row0", (PASSES[0], broken))
    assert [name for _, name, _, _ in observer.records] == ["drop_asserts"]


def test_a_wrong_order_runs_nothing(stack):
    observer = Observer(Options())
    writes, reads = (PASSES[NAMES.index(name)] for name in ("insert_cache_writes", "insert_cache_reads"))
    with pytest.raises(PassError, match="insert_cache_reads must come after insert_cache_writes"):
        observer.run_all(stack.graph(), ROW, "row0", (reads, writes))
    assert observer.records == []


def test_a_pass_left_out_is_no_violation():
    check_order(PASSES[2:])
