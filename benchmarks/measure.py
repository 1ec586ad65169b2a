"""Timing side by side, machine facts, and result files."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from dcc.files import write_file
from dcc.text import error_line

RESULTS = Path(__file__).parent / "results"
SETTLE = 0.5  # seconds after a run, in which another process's idle threads still spin


class Contestant:
    """A run in a process of its own, because Dynamo's guards of one contestant slow down the others of a process.

    `make(*arguments)`, a function of a module, gives facts and the run there, and is called at once; the run returns
    its seconds. Where either raises, `facts` holds a `reason` instead.
    """

    def __init__(self, make: Callable[..., tuple[dict[str, Any], Callable[[], float]]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.facts: dict[str, Any] = self._answer()

    @property
    def runs(self) -> bool:
        """Whether it can be timed."""
        return "reason" not in self.facts

    def seconds(self) -> float:
        """One run."""
        time.sleep(SETTLE)
        self.link.send(True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self.link.close()
        self.process.join()

    def _answer(self) -> Any:
        try:
            return self.link.recv()
        except EOFError:
            return {"reason": f"the process ended ({self.process.exitcode})"}


def _serve(make: Callable[..., Any], arguments: tuple[Any, ...], link: Connection) -> None:
    """The other side of a Contestant."""
    try:
        facts, run = make(*arguments)
    except Exception as error:  # whatever a library raises on what it does not know
        link.send({"reason": error_line(error)})
        return
    link.send(facts)
    try:
        while link.recv():
            link.send(run())
    except EOFError:
        return


def taking_turns(contestants: Sequence[Contestant], repeats: int) -> list[list[float]]:
    """Seconds of every contestant, interleaved so that a noisy minute hits all alike; none of those that do not run."""
    seconds: list[list[float]] = [[] for _ in contestants]
    for _ in range(repeats):
        for contestant, own in zip(contestants, seconds, strict=True):
            if contestant.runs:
                own.append(contestant.seconds())
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over repeats of the ratio within one repeat: what the two did in the same minute."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def write(name: str, data: dict[str, Any]) -> Path:
    """Writes benchmarks/results/<name>.json with the machine's facts, atomically."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_file(path, json.dumps({"machine": machine(), **data}, indent=1) + "\n")
    return path


def draw(path: Path, figure: Any, dpi: int) -> None:
    """Writes a matplotlib figure as a PNG without a margin, atomically, and prints where it is."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi, bbox_inches="tight")
    write_file(path, data.getvalue())
    print(path)
