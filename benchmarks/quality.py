"""Quality against compute on the demo pipelines: dcc, other libraries' caches, and fewer steps.

    python benchmarks/quality.py unet [--prompts 32] [--only REGEX] [--refresh]
    python benchmarks/quality.py unet --table
    python benchmarks/quality.py unet --plot quality_unet.png
    python benchmarks/quality.py unet --survey --prompts 8     the survey's methods in dcc, and its searched plans

Quality is that of the final images of the test prompts against the uncached pipeline; compute is the denoiser's FLOPs
over a whole run, counted in real runs. Parameters that decide how much is computed are tuned to each budget on
calibration prompts. Writes benchmarks/results/quality_<pipeline>.json after every row; rows already measured with the
same weights are kept.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Annotated, Any

import diffusers
import measure
import torch
import transformers
import typer
from baselines import baselines, solver_plans
from methods import methods
from peers import peers
from rich.console import Console
from rich.table import Table
from subjects import BUDGETS, SLACK, Contestant, DoesNotRun, Subject
from torch.utils.flop_counter import FlopCounterMode

import dcc
from dcc.passes.costs import FLOP_FORMULAS
from dcc.quality import psnr, ssim
from dcc.record.target import Samples
from dcc.text import error_line
from dcc.torch_internals import COMPILED_CALL, plain_call

SEED = 1000  # of the first test prompt
CALIBRATION_SEED = 0
BATCH = 16
TUNING = 6  # calibration prompts on which knobs are tuned, for contestants that decide by what they see
REFINEMENTS, CLOSE = 4, 1.04  # how often a tuned threshold is moved, and how far above the budget it may stay
SAME = 100.0  # dB; images closer than this are equal
VERSIONS = ("torch", "diffusers", "transformers", "cache-dit", "DeepCache", "diffusion-cache-compiler")


class _NoModules(contextlib.nullcontext):
    """Instead of the tracker that names modules, which never ends on the looped ones that cache-dit makes."""

    parents = frozenset({"Global"})


@contextlib.contextmanager
def counted(net: torch.nn.Module) -> Iterator[list[int]]:
    """FLOPs of every call of the denoiser, as torch counts them in what is really executed.

    Counts at the outermost door of the module, so that what dcc runs in its place is counted too.
    """
    counts: list[int] = []
    own = vars(net).get(COMPILED_CALL)
    inner = own or plain_call(net)

    def counting(*args: Any, **kwargs: Any) -> Any:
        counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
        counter.mod_tracker = _NoModules()
        with counter:
            result = inner(*args, **kwargs)
        counts.append(counter.get_total_flops())
        return result

    vars(net)[COMPILED_CALL] = counting
    try:
        yield counts
    finally:
        if own is None:
            del vars(net)[COMPILED_CALL]
        else:
            vars(net)[COMPILED_CALL] = own


class Measurement:
    """One subject on its test prompts: the uncached images and FLOPs, and rows of contestants against them."""

    def __init__(self, subject: Subject, prompts: int) -> None:
        self.subject = subject
        self.prompts, self.calib = dcc.demo.prompts("test")[:prompts], dcc.demo.prompts("calib")
        self.seeds = [SEED + index for index in range(len(self.prompts))]
        self.reference, _ = self._batches(None, {}, False)
        self.flops = self._one_by_one(None, {}, self.prompts[:1], SEED)[1][0]
        self._tried: dict[tuple[str, Any], float] = {}  # speed-ups on calibration prompts
        self._reached: dict[tuple[str, str], dict[str, Any]] = {}  # a setting may be the answer to two budgets

    def row(self, contestant: Contestant) -> dict[str, Any]:
        """What a contestant reaches, or the reason why it does not run."""
        facts = {
            "name": contestant.name,
            "family": contestant.family,
            "budget": contestant.budget,
            "parameters": contestant.parameters,
            "weights": self.subject.weights,
            "prompts": len(self.prompts),
        }
        start = time.perf_counter()
        try:
            with _quiet():
                facts |= self._measured(contestant)
        except DoesNotRun as reason:
            facts["reason"] = str(reason)
        except Exception as error:  # a peer may fail in any way; the row says how
            facts["reason"] = error_line(error)
        facts["seconds"] = round(time.perf_counter() - start, 1)
        self._check_clean(contestant)
        return facts

    def _measured(self, contestant: Contestant) -> dict[str, Any]:
        parameters = dict(contestant.parameters)
        if contestant.knob:
            parameters[contestant.knob.name] = self._tune(contestant)
        facts = self._at(contestant, parameters)
        if contestant.dynamic and contestant.knob:
            facts = self._refine(contestant, facts)
        return facts

    def _refine(self, contestant: Contestant, facts: dict[str, Any]) -> dict[str, Any]:
        """A threshold tuned on other prompts, moved a little until the test prompts meet the budget closely."""
        name, least = contestant.knob.name, SLACK * contestant.budget
        for _ in range(REFINEMENTS):
            short = facts["speedup"] < least
            if not short and facts["speedup"] <= CLOSE * contestant.budget:
                break
            moved = facts["parameters"][name] * (1.08 if short else 0.95)
            other = self._at(contestant, facts["parameters"] | {name: float(f"{moved:.4g}")})
            if not short and other["speedup"] < least:
                break
            facts = other
        return facts

    def _at(self, contestant: Contestant, parameters: dict[str, Any]) -> dict[str, Any]:
        """Quality and compute on the test prompts with these parameters."""
        key = (_label(contestant.name), repr(parameters))
        if key in self._reached:
            return self._reached[key]
        with self._installed(contestant, parameters) as (pipe, changes):
            if contestant.dynamic and not contestant.shared:
                images, counts = self._one_by_one(pipe, changes, self.prompts, SEED)
            else:  # dcc decides for every sample of a batch apart
                images, mean = self._batches(pipe, changes, contestant.dynamic)
                counts = [mean] * len(self.prompts)
                if not contestant.dynamic:
                    _, counts = self._one_by_one(pipe, changes, self.prompts[:1], SEED)
        if not torch.isfinite(images.raw).all():
            raise DoesNotRun("gives values that are not finite")
        flops = statistics.mean(counts)
        shown, raw = _compare(images.images, self.reference.images), _compare(images.raw, self.reference.raw)
        self._reached[key] = {
            "parameters": parameters,
            "speedup": self.flops / flops if flops else math.inf,
            "gflops": flops / 1e9,
            "flops_runs": len(counts),
            **shown,
            "before_clamp": raw,
        }
        return self._reached[key]

    def _tune(self, contestant: Contestant) -> Any:
        """The knob's value with the most compute that meets the budget, by bisection on measured FLOPs."""
        knob, budget = contestant.knob, SLACK * contestant.budget

        def speedup(value: Any) -> float:
            key = (_label(contestant.name), value)
            if key not in self._tried:
                prompts = self.calib[:TUNING] if contestant.dynamic else self.calib[:1]
                with self._installed(contestant, contestant.parameters | {knob.name: value}) as (pipe, changes):
                    _, counts = self._one_by_one(pipe, changes, prompts, CALIBRATION_SEED)
                self._tried[key] = self.flops / max(statistics.mean(counts), 1)
            return self._tried[key]

        if knob.values:
            return _first(speedup, knob.values, budget)
        known = {value: ratio for (label, value), ratio in self._tried.items() if label == _label(contestant.name)}
        low = max((value for value, ratio in known.items() if ratio < budget), default=knob.low)
        high = min((value for value, ratio in known.items() if ratio >= budget), default=knob.high)
        return _bisect(speedup, low, high, budget)

    @contextlib.contextmanager
    def _installed(self, contestant: Contestant, parameters: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        pipe = self.subject.pipe if contestant.shared else self.subject.fresh()
        with contestant.install(self.subject, pipe, **parameters) as changes:
            yield pipe, changes or {}

    def _one_by_one(
        self, pipe: Any, changes: dict[str, Any], prompts: Sequence[str], seed: int
    ) -> tuple[Samples, list[int]]:
        """The images of prompts run one at a time, and the FLOPs of each run."""
        target, images, totals = self.subject.target(pipe, changes), [], []
        for index, prompt in enumerate(prompts):
            with counted(target.module) as counts:
                images.append(target.generate([prompt], [seed + index]))
            totals.append(sum(counts))
        return Samples.concatenate(images), totals

    def _batches(self, pipe: Any, changes: dict[str, Any], counting: bool) -> tuple[Samples, float]:
        """The images of all prompts, in batches, and the mean FLOPs of a prompt where they are counted."""
        target, parts, total = self.subject.target(pipe, changes), [], 0
        for at in range(0, len(self.prompts), BATCH):
            with counted(target.module) if counting else contextlib.nullcontext([]) as counts:
                parts.append(target.generate(self.prompts[at : at + BATCH], self.seeds[at : at + BATCH]))
            total += sum(counts)
        return Samples.concatenate(parts), total / len(self.prompts)

    def _check_clean(self, contestant: Contestant) -> None:
        """Raises RuntimeError where a contestant left anything behind that changes the uncached pipeline."""
        images = self.subject.target().generate(self.prompts[:1], self.seeds[:1]).raw
        if min(psnr(images, self.reference.raw[:1])) < SAME:
            raise RuntimeError(f"after {contestant.name} the uncached pipeline gives other images than before")


def _first(speedup: Callable[[Any], float], values: Sequence[Any], budget: float) -> Any:
    """The first of `values`, which compute less and less, that reaches the budget."""
    if speedup(values[0]) >= budget:
        return values[0]
    first, last = 1, len(values) - 1
    if speedup(values[last]) < budget:
        raise DoesNotRun(f"reaches {speedup(values[last]):.2f}x at most")
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if speedup(values[middle]) >= budget else (middle + 1, last)
    return values[last]


def _bisect(speedup: Callable[[Any], float], low: float, high: float, budget: float) -> float:
    """The smallest threshold between two that reaches the budget, to a few percent."""
    if speedup(high) < budget:
        raise DoesNotRun(f"reaches {speedup(high):.2f}x at most")
    while high > 1.03 * low:
        middle = float(f"{math.sqrt(low * high):.4g}")
        low, high = (low, middle) if speedup(middle) >= budget else (middle, high)
    return high


def _label(name: str) -> str:
    """A contestant's name without the budget."""
    return name.rsplit(" @ ", 1)[0]


def _compare(images: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    decibels = [min(value, SAME) for value in psnr(images, reference)]
    similar = ssim(images, reference)
    return {
        "psnr": statistics.mean(decibels),
        "psnr_worst": min(decibels),
        "psnr_spread": statistics.stdev(decibels) if len(decibels) > 1 else 0.0,
        "ssim": statistics.mean(similar),
        "ssim_worst": min(similar),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def load(name: str, suite: str) -> dict[str, Any]:
    """The result file of a pipeline; without rows where there is none yet."""
    path = measure.RESULTS / f"{suite}_{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {"rows": []}


def run(name: str, suite: str, prompts: int, only: str, refresh: bool) -> None:
    """Measures every contestant of a suite that has no row yet."""
    subject = Subject(name)
    if suite == "survey":
        everyone = [*methods(subject), *solver_plans(subject)]
    else:
        everyone = [*baselines(subject), *peers(subject)]
    order = {contestant.name: index for index, contestant in enumerate(everyone)}
    kept = (row for row in load(name, suite)["rows"] if row["weights"] == subject.weights and row["name"] in order)
    rows = {row["name"]: row for row in kept}
    todo = [c for c in everyone if re.search(only, c.name) and (refresh or not _holds(rows.get(c.name), c, prompts))]
    if not todo:
        print("every row is there; --refresh measures again")
        return
    measurement = Measurement(subject, prompts)
    for index, contestant in enumerate(todo):
        row = rows[contestant.name] = measurement.row(contestant)
        said = row.get("reason") or f"{row['speedup']:.2f}x {row['psnr']:.1f} dB, worst {row['psnr_worst']:.1f}"
        print(f"{index + 1}/{len(todo)} {contestant.name}: {said} ({row['seconds']} s)", flush=True)
        facts = {
            "pipeline": name,
            "weights": subject.weights,
            "versions": _versions(),
            "call": subject.call,
            "gflops": measurement.flops / 1e9,
            "slack": SLACK,
            "rows": sorted(rows.values(), key=lambda row: order[row["name"]]),
        }
        measure.write(f"{suite}_{name}", facts)


def _holds(row: dict[str, Any] | None, contestant: Contestant, prompts: int) -> bool:
    """Whether a row is there that says what measuring again would."""
    if row is None or row["prompts"] < prompts:
        return False
    own = json.loads(json.dumps(contestant.parameters))  # as the file gives them back
    return all(row["parameters"].get(name) == value for name, value in own.items())


def best(rows: Sequence[dict[str, Any]], budget: float) -> list[dict[str, Any]]:
    """The best row of each family among those that meet the budget, the best family first."""
    chosen: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("speedup", 0.0) >= SLACK * budget:
            held = chosen.get(row["family"])
            if held is None or row["psnr"] > held["psnr"]:
                chosen[row["family"]] = row
    return sorted(chosen.values(), key=lambda row: -row["psnr"])


def table(name: str, suite: str) -> None:
    """Prints, for every budget, the best of each family."""
    data = load(name, suite)
    console = Console(width=160)
    for budget in BUDGETS:
        shown = Table("family", "best", "speed-up", "PSNR", "worst", "SSIM", "PSNR before the clamp", "worst")
        shown.title = f"{name}: at least {budget:g}x fewer FLOPs"
        for row in best(data["rows"], budget):
            raw = row["before_clamp"]
            numbers = [row["psnr"], row["psnr_worst"], row["ssim"], raw["psnr"], raw["psnr_worst"]]
            texts = [f"{value:.4f}" if index == 2 else f"{value:.1f}" for index, value in enumerate(numbers)]
            label = _label(row["name"])
            shown.add_row(row["family"], label, f"{row['speedup']:.2f}x", *texts)
        console.print(shown)
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in data["rows"]:
        if "reason" in row:
            label, _, budget = row["name"].partition(" @ ")
            reasons.setdefault((label, row["reason"]), []).append(budget)
    for (label, reason), budgets in reasons.items():
        console.print(f"{label} {', '.join(budgets)}: {reason}", highlight=False)


def plot(name: str, suite: str, path: str) -> None:
    """Draws PSNR against FLOPs speed-up, the best settings of each family as one line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families: dict[str, list[tuple[float, float]]] = {}
    for row in load(name, suite)["rows"]:
        if row.get("speedup", 0.0) > 1.0 and row["family"] != "uncached":
            families.setdefault(row["family"], []).append((row["speedup"], row["psnr"]))
    figure, axes = pyplot.subplots(figsize=(11, 7))
    markers = "osD^v<>P*X"
    for index, (family, points) in enumerate(families.items()):
        front = [(x, y) for x, y in sorted(points) if y >= max(other for at, other in points if at >= x)]
        style = {"linewidth": 3, "color": "black"} if family == "dcc solver" else {"linewidth": 1.2}
        marker = markers[index % len(markers)]
        axes.plot([x for x, _ in front], [y for _, y in front], marker=marker, markersize=5, label=family, **style)
    axes.set(xlabel="denoiser FLOPs, uncached over cached", ylabel="PSNR to the uncached image, dB", xscale="log")
    axes.set_xticks(BUDGETS, [f"{budget:g}x" for budget in BUDGETS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(name)
    measure.draw(path, figure, dpi=120)


def main(
    pipeline: Annotated[str, typer.Argument(help="mmdit or unet")],
    prompts: Annotated[int, typer.Option(help="test prompts")] = 64,
    survey: Annotated[bool, typer.Option(help="the survey's methods in dcc, in a result file of their own")] = False,
    only: Annotated[str, typer.Option(help="contestants whose name matches this")] = "",
    refresh: Annotated[bool, typer.Option(help="measure rows again that are there")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads, 0 for torch's own choice")] = 0,
    show: Annotated[bool, typer.Option("--table", help="print the result file by budget; measure nothing")] = False,
    draw: Annotated[str, typer.Option("--plot", help="draw the result file to this image; measure nothing")] = "",
) -> None:
    """Measures, prints or draws."""
    suite = "survey" if survey else "quality"
    if show or draw:
        if show:
            table(pipeline, suite)
        if draw:
            plot(pipeline, suite, draw)
        return
    if threads:
        torch.set_num_threads(threads)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    run(pipeline, suite, prompts, only, refresh)


if __name__ == "__main__":
    typer.run(main)
