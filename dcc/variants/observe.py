"""The one observer of the compiler: runs each pass, times it, counts edits, verifies, dumps, and can stop or skip.

| variable | effect |
|---|---|
| `DCC_DEBUG=1` | one line per pass on stderr: seconds, edits, nodes |
| `DCC_DEBUG=2` | also the changed lines of the graph text |
| `DCC_DEBUG=3` | the whole text after each pass |
| `DCC_DUMP=dir` | writes `<variant>_<nn>_<pass>.txt` into `dir`; the last one of a variant is what goes to Inductor |
| `DCC_UNTIL=pass` | runs the passes up to and including this one |
| `DCC_SKIP=a,b` | leaves these optional passes out |
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.fx import GraphModule

from dcc import passes as rewrites
from dcc.errors import OptionError, PassError
from dcc.files import write_file
from dcc.passes.base import VARIANT, Pass, Row
from dcc.passes.text import text
from dcc.passes.verify import verify
from dcc.torch_internals import without_guards


@dataclass(frozen=True)
class Options:
    """The DCC_* environment variables, read and checked once per compile."""

    debug: int = 0
    dump: Path | None = None
    until: str | None = None
    skip: frozenset[str] = frozenset()

    @classmethod
    def from_env(cls) -> Options:
        """The options that the environment sets. Raises OptionError, listing the good values, for a bad one."""
        names = [p.name for p in rewrites.PASSES]
        debug = os.environ.get("DCC_DEBUG", "0") or "0"
        if debug not in ("0", "1", "2", "3"):
            raise OptionError(f"DCC_DEBUG={debug!r}: use 0, 1, 2 or 3")
        until = os.environ.get("DCC_UNTIL") or None
        if until is not None and until not in names:
            raise OptionError(f"DCC_UNTIL={until!r} is no pass; passes are: {', '.join(names)}")
        skip = frozenset(name for name in os.environ.get("DCC_SKIP", "").split(",") if name)
        optional = [p.name for p in rewrites.PASSES if p.optional]
        if bad := sorted(skip.difference(optional)):
            raise OptionError(f"DCC_SKIP={','.join(bad)!r}: only these passes may be skipped: {', '.join(optional)}")
        dump = os.environ.get("DCC_DUMP")
        return cls(int(debug), Path(dump) if dump else None, until, skip)


@dataclass
class Observer:
    """Runs passes over the graphs of one compile; `records` holds (variant, pass, seconds, edits)."""

    options: Options = field(default_factory=Options.from_env)
    records: list[tuple[str, str, float, int]] = field(default_factory=list)

    def run_all(
        self,
        graph_module: GraphModule,
        row: Row,
        variant: str,
        passes: Sequence[Pass] | None = None,
        stage: str = VARIANT,
    ) -> None:
        """Runs the passes of a stage in order, those of PASSES where none are given.

        Raises PassError where one breaks the graph, or where their declared order is not met.
        """
        passes = rewrites.PASSES if passes is None else passes
        check_order(passes)
        for index, pass_ in enumerate(own for own in passes if own.stage == stage):
            if pass_.name not in self.options.skip:
                self.run(pass_, graph_module, row, variant, index)
            if pass_.name == self.options.until:
                break
        graph_module.recompile()

    def run(self, pass_: Pass, graph_module: GraphModule, row: Row, variant: str, index: int = 0) -> int:
        """Runs one pass, verifies what it left and returns its number of edits."""
        before = text(graph_module) if self.options.debug >= 2 else ""
        start = time.perf_counter()
        with without_guards():
            edits = pass_.run(graph_module, row)
        seconds = time.perf_counter() - start
        verify(graph_module, pass_.name)
        self.records.append((variant, pass_.name, seconds, edits))
        self._show(pass_, graph_module, variant, index, before, seconds, edits)
        return edits

    def _show(
        self, pass_: Pass, graph_module: GraphModule, variant: str, index: int, before: str, seconds: float, edits: int
    ) -> None:
        if self.options.debug:
            nodes = len(graph_module.graph.nodes)
            print(f"dcc {variant} {pass_.name}: {edits} edits, {nodes} nodes, {seconds:.3f} s", file=sys.stderr)
        if self.options.debug == 2 and edits:
            lines = difflib.unified_diff(before.splitlines(), text(graph_module).splitlines(), lineterm="", n=0)
            print("\n".join(lines), file=sys.stderr)
        if self.options.debug == 3:
            print(text(graph_module), file=sys.stderr)
        if self.options.dump:
            self.options.dump.mkdir(parents=True, exist_ok=True)
            write_file(self.options.dump / f"{variant}_{index:02d}_{pass_.name}.txt", text(graph_module))


def check_order(passes: Sequence[Pass]) -> None:
    """Raises PassError, listing every violation, unless each pass comes after those it names."""
    names = [p.name for p in passes]
    problems = [
        f"{p.name} must come after {other}"
        for index, p in enumerate(passes)
        for other in p.after
        if other in names and names.index(other) > index
    ]
    if problems:
        raise PassError("; ".join(problems))
