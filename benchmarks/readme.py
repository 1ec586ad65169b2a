"""Writes every measured table from benchmarks/results/ between its markers, in each document that has them.

    python benchmarks/readme.py

A table `name` stands between the lines `<!-- name -->` and `<!-- end -->`, in one document or in several. One whose
result file is missing is left as it is; one that has no marker anywhere is an error.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcc.files import write_file
from dcc.policies import POLICIES

HERE = Path(__file__).parent
COMPILED, NOT = ", compiled", "does not run"  # the first ends the names of contestants of speed.py
PARTS = (("cold", "captured"), ("cold", "lowered"), ("cold", "seconds"), ("warm", "lowered"), ("warm", "seconds"))
README = HERE.parent / "README.md"
BENCHMARKS_README = HERE / "README.md"
POLICIES_README = HERE.parent / "dcc" / "policies" / "README.md"
DENOISERS = {
    "mmdit": "multimodal DiT, 3 double and 5 single blocks, flow matching, 28 steps",
    "unet": "U-Net with cross-attention, guidance merged in the batch, DDIM, 50 steps",
}


def speed(data: dict[str, Any]) -> str:
    """Wall clock beside other libraries' caches at the same full steps."""
    machine, turns = data["machine"], sorted({len(case["rows"][0]["seconds"]) for case in data["cases"]})
    last = f" or {turns[-1]}" if turns[1:] else ""
    median = f"median of {', '.join(map(str, turns[: len(turns) - 1 or 1]))}{last} turns"
    steps = data["cases"][0]["full_steps"]
    rows = [{row["name"]: row for row in case["rows"]} for case in data["cases"]]
    names = list(dict.fromkeys(row["name"] for case in data["cases"] for row in [*case["rows"], *case["failed"]]))
    lines = [
        wrapped(
            f"Wall clock at {sum(steps)} full steps of {len(steps)}. Each contestant in a process of its own, in turns "
            f"with `torch.compile` of the uncached denoiser, {median} (torch {machine['torch']}, {machine['cores']} "
            "CPU cores, random weights); in brackets the share of what the full steps alone imply, for dcc of what the "
            "plan's FLOPs imply. "
            "Libraries run eagerly and compiled:"
        ),
        "",
        "| contestant | " + " | ".join(f"{c['case']}, {c['forward_ms']:.0f} ms per call" for c in data["cases"]) + " |",
        "|---|" + "---|" * len(data["cases"]),
    ]
    for name in (name for name in names if not name.endswith(COMPILED)):
        cells, both = [], [own for own in (name, name + COMPILED) if own in names]
        for case in rows:
            runs = [f"{case[n]['ratio']:.2f}x ({case[n]['share']:.2f})" if n in case else NOT for n in both]
            cells.append("; ".join(runs) if set(runs) != {NOT} else NOT)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(data: dict[str, Any]) -> str:
    """Realised against FLOPs-implied speed-up of dcc at several ratios."""
    lines = ["| dcc, against `torch.compile` | FLOPs-implied | realised | share |", "|---|---|---|---|"]
    for case in data["cases"]:
        for row in (row for row in case["rows"] if row["name"].startswith("dcc")):
            lines.append(f"| {case['case']} | {row['implied']:.2f}x | {row['ratio']:.2f}x | {row['share']:.2f} |")
    return "\n".join(lines)


def latency(results: list[dict[str, Any]]) -> str:
    """Measured latency and quality at every budget: the searched plan and the best library."""
    lines = [
        "| pipeline | FLOPs | searched plan: latency | PSNR | best library there | FLOPs | latency | PSNR |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data in results:
        for budget in sorted({row["budget"] for row in data["rows"]}):
            rows = [row for row in data["rows"] if row["budget"] == budget and "ratio" in row]
            plan = next(row for row in rows if row["family"] == "dcc solver")
            peer = max((r for r in rows if r["family"] not in ("uncached", "dcc solver")), key=lambda row: row["ratio"])
            name = f"{peer['family'].split()[0]}, {peer['name'].split(' @ ')[0]}{', compiled' * peer['compiled']}"
            name = name.removeprefix("DeepCache, ")
            cells = [f"1/{r['speedup']:.1f} | {r['ratio']:.2f}x | {r['psnr']:.1f} dB" for r in (plan, peer)]
            lines.append(f"| `{data['pipeline']}` | {cells[0]} | {name} | {cells[1]} |")
    return "\n".join(lines)


def compile_time(data: dict[str, Any]) -> str:
    """Cold and warm compilation."""
    lines = [
        "| | blocks | capture | lowering | in all | second process: lowering | second process: in all |",
        "|---|---|---|---|---|---|---|",
    ]

    def part(row: dict[str, Any], kind: str, name: str) -> str:
        return f"{statistics.median(run[name] for run in row[kind]):.1f} s" if name in row[kind][0] else "-"

    for row in data["rows"]:
        what = "`torch.compile`, uncached" if row["which"] == "torch" else "dcc, both variants of a 4x plan"
        cells = [part(row, kind, name) for kind, name in PARTS]
        lines.append(f"| {what} | {row['blocks']} | {' | '.join(cells)} |")
    kept = {name: f"{fact['bytes'] / 1e6:.1f} MB in {fact['tensors']} tensors" for name, fact in data["cache"].items()}
    lines += [
        "",
        wrapped(
            "Cache of a first-order forecast of all 57 blocks (256 + 32 tokens of width 256): every branch before its "
            f"gate {kept['branches']}; every block's residual {kept['blocks, apart']}, which coalescing makes "
            f"{kept['blocks']}."
        ),
    ]
    return "\n".join(lines)


def hoisting(data: dict[str, Any]) -> str:
    """What no step changes: its share of FLOPs, the bytes that hold it, and the time saved."""
    machine = data["machine"]
    lines = [
        wrapped(
            f"One all-compute plan with and without hoisting, called in turns, {data['backend']} backend, median of "
            f"{data['repeats'] * (data['steps'] - 1)} calls (torch {machine['torch']}, CPU, random weights, few "
            "blocks; tokens of prompt and sample in the released ratio). Shares at the released number of blocks "
            "stand beside, and those of what depends on the timestep alone, which is not hoisted:"
        ),
        "",
        "| family | FLOPs hoisted | call saved | hoisted at the released depth | held per request "
        "| timestep only: FLOPs | timestep only: weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        saved = f"{row['saved_share']:.1%}".replace("-0.0%", "0.0%") if "saved_share" in row else row["problem"]
        lines.append(
            f"| {row['case']} | {row['hoisted_share']:.1%} | {saved} | {row['hoisted_share_released']:.1%} "
            f"| {row['hoisted_values']} values, {row['hoisted_bytes'] / 1e6:.1f} MB "
            f"| {row['timestep_share_released']:.2%} | {row['timestep_weights_share']:.0%} |"
        )
    return "\n".join(lines)


def zoo(results: list[dict[str, Any]]) -> str:
    """How often the demo pipelines draw what a held-out caption says."""
    lenient, stricter = list(results[0]["judge_on_autoencoded_drawings"]["followed_by_clarity"].items())[:2]
    lines = [
        wrapped(
            f"Judged from the pixels of {results[0]['held_out']['all']['images']} images. A shape counts from an "
            f"overlap of {lenient[0]} with a drawn template, at which the judge accepts {lenient[1]:.1%} of true "
            f"drawings; the stricter judge asks for {stricter[0]} and accepts {stricter[1]:.1%} of them:"
        ),
        "",
        "| pipeline | denoiser | held-out captions followed | one object | two objects | all, stricter judge | bar |",
        "|---|---|---|---|---|---|---|",
    ]
    for data in results:
        held_out = data["held_out"]
        kinds = [f"{held_out[kind]['followed']:.1%}" for kind in ("all", "one_object", "two_objects")]
        kinds.append(f"{held_out['followed_by_clarity']['0.7']:.1%}")
        reached = [
            share >= data["bar"] for share in (held_out["all"]["followed"], held_out["followed_by_clarity"]["0.7"])
        ]
        verdict = "reached" if all(reached) else "reached by the first judge only" if any(reached) else "not reached"
        bar = f"{data['bar']:.0%}, {verdict}"
        lines.append(f"| `{data['name']}` | {DENOISERS[data['name']]} | {' | '.join(kinds)} | {bar} |")
    return "\n".join(lines)


def quality(results: list[dict[str, Any]]) -> str:
    """The searched plan against the best of everything else at the same compute or less."""
    lines = [
        f"Mean and worst over {_prompts(results)} test prompts that the search never saw:",
        "",
        "| pipeline | FLOPs | searched plan, PSNR | worst prompt | best rival at that compute or less | PSNR | gain |",
        "|---|---|---|---|---|---|---|",
    ]
    for data in results:
        for budget in (2, 3, 4, 5, 7):
            rows = [row for row in data["rows"] if row.get("speedup", 0.0) >= data["slack"] * budget]
            ours = [row for row in rows if row["family"] == "dcc solver" and row["budget"] == budget]
            if not ours:
                continue
            rival = max((row for row in rows if row["family"] != "dcc solver"), key=lambda row: row["psnr"])
            gain = ours[0]["psnr"] - rival["psnr"]
            lines.append(
                f"| `{data['pipeline']}` | 1/{budget} | {ours[0]['psnr']:.1f} dB | {ours[0]['psnr_worst']:.1f} dB "
                f"| {rival['name'].rsplit(' @ ', 1)[0]} | {rival['psnr']:.1f} dB | {gain:+.1f} dB |"
            )
    return "\n".join(lines)


def runs(data: dict[str, Any]) -> str:
    """A plan at other step counts, and with the guard."""
    lines = [
        f"Mean and worst over {data['prompts']} test prompts:",
        "",
        "| steps | plan made for | full steps | PSNR | worst prompt |",
        "|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        made = f"{row['plan_for']} steps" + (", guard" if row.get("guard") else "")
        lines.append(
            f"| {row['steps']} | {made} | {row['computed']:.1f} | {row['psnr']:.1f} dB | {row['psnr_worst']:.1f} dB |"
        )
    return "\n".join(lines)


def promise(data: dict[str, Any]) -> str:
    """Whether a quality target holds on new prompts."""
    lines = [
        f"`quality={data['quality']:g}` (effort {data['effort']!r}), then run on {data['prompts']} test prompts:",
        "",
        "| pipeline | FLOPs | PSNR held back | PSNR on test prompts | worst of them |",
        "|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        lines.append(
            f"| `{row['pipeline']}` | 1/{row['speedup']:.1f} | {row['held_back']:.1f} dB | {row['psnr']:.1f} dB "
            f"| {row['psnr_worst']:.1f} dB |"
        )
    return "\n".join(lines)


def conformance(data: dict[str, Any]) -> str:
    """Whether policies decide and draw as other libraries' own implementations."""
    lines = [
        f"On {data['prompts']} test prompts, one at a time; images of 100 dB and more are equal to float rounding:",
        "",
        "| library's own | pipeline | settings | policy | same steps computed | PSNR between the two |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        settings = ", ".join(f"{name} {value}" for name, value in row["settings"].items() if value != "")
        same = "yes" if row.get("same_decisions") else "no"
        between = "over 100 dB" if row.get("psnr_between", 0) >= 100 else f"{row.get('psnr_between', math.nan):.1f} dB"
        verdict = f"{same} | {between}" if "error" not in row else f"- | {row['error']}"
        lines.append(f"| {row['peer']} | `{row['pipeline']}` | {settings} | `{row['policy']}` | {verdict} |")
    return "\n".join(lines)


def survey(results: list[dict[str, Any]]) -> str:
    """The best method of every class of the survey at some ratios of FLOPs, and the searched plan."""
    lines = [
        f"The survey's best method of each class, at such a ratio of FLOPs or above, on {_prompts(results)} prompts:",
        "",
        "| pipeline | class | 2x | 3x | 5x |",
        "|---|---|---|---|---|",
    ]
    for data in results:
        families = dict.fromkeys(row["family"] for row in data["rows"])
        for family in families:
            cells = []
            for budget in (2, 3, 5):
                fitting = [r for r in data["rows"] if r["family"] == family and r.get("speedup", 0) >= 0.98 * budget]
                best = max(fitting, key=lambda row: row["psnr"], default=None)
                policy = best and best["parameters"].get("policy")  # a searched plan has none
                named = f" ({POLICIES[policy].title})" if policy else ""
                cells.append(f"{best['psnr']:.1f} dB{named}" if best else "-")
            label = "searched plan" if family == "dcc solver" else family.removeprefix("survey: ").replace("_", "-")
            lines.append(f"| `{data['pipeline']}` | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def methods(results: list[dict[str, Any]]) -> str:
    """Every method: what it is, and what it reaches on both pipelines, or why it does not run."""
    names = [data["pipeline"] for data in results]
    lines = [
        f"On {_prompts(results)} test prompts:",
        "",
        "| method | policy | class | decided by | forecast | source | checked | " + " | ".join(names) + " |",
        "|---|---|---|---|---|---|---|" + "---|" * len(names),
    ]
    for method in POLICIES.values():
        cells = []
        for data in results:
            rows = [row for row in data["rows"] if row["parameters"].get("policy") == method.name]
            run = [f"{row['speedup']:.2f}x {row['psnr']:.1f} dB" for row in rows if "speedup" in row]
            cells.append("; ".join(run) or (f"refuses: {rows[0]['reason']}" if rows else "needs trained weights"))
        facts = (method.kind.replace("_", "-"), method.trigger, method.predictor, method.source, method.checked)
        lines.append(f"| {method.title} | `{method.name}` | {' | '.join(facts)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def host_overhead(data: dict[str, Any]) -> str:
    """Milliseconds of dcc's own Python per call."""
    machine = data["machine"]
    lines = [
        wrapped(
            f"A transformer of {data['blocks']} blocks, eagerly, on one thread (torch {machine['torch']}, "
            f"{machine['cores']} CPU cores); medians over all steps of a kind:"
        ),
        "",
        "| selectors of the plan | forecast step | full step | calls |",
        "|---|---|---|---|",
    ]
    for row in data["rows"]:
        number = row["name"].split()[0]
        lines.append(f"| {number} | {row['forecast_ms']:.2f} ms | {row['full_ms']:.2f} ms | {row['calls']} |")
    if look := data.get("look"):
        said = (
            f"Twice in a request dcc looks whether the denoiser is as it was. With the {look['modules']:,} modules of "
            f"a full-size multimodal DiT a look takes {look['look_ms']:.2f} ms; two looks are {look['share']:.3%} of a "
            f"generation of {look['steps']} steps with one of width 256 on this machine."
        )
        lines += ["", wrapped(said)]
    return "\n".join(lines)


@dataclass(frozen=True)
class Table:
    """A table and its result files: one by name, or one for each demo pipeline, whose name stands for the `{}`."""

    make: Callable[[Any], str]
    results: str

    def text(self) -> str | None:
        """The table, None where a result file is missing."""
        names = [self.results.format(name) for name in DENOISERS] if "{}" in self.results else [self.results]
        files = [HERE / "results" / f"{name}.json" for name in names]
        if not all(file.exists() for file in files):
            return None
        data = [json.loads(file.read_text()) for file in files]
        return self.make(data if "{}" in self.results else data[0])


TABLES = {
    "quality": Table(quality, "quality_{}"),
    "survey": Table(survey, "survey_{}"),
    "methods": Table(methods, "survey_{}"),
    "conformance": Table(conformance, "conformance"),
    "latency": Table(latency, "latency_{}"),
    "promise": Table(promise, "promise"),
    "runs": Table(runs, "other_runs_mmdit"),
    "speed": Table(speed, "speed"),
    "ratios": Table(ratios, "speed_ratios"),
    "host_overhead": Table(host_overhead, "host_overhead"),
    "compile_time": Table(compile_time, "compile_time"),
    "hoisting": Table(hoisting, "hoisting"),
    "zoo": Table(zoo, "zoo_{}"),
}


def _prompts(results: list[dict[str, Any]]) -> str:
    """How many test prompts the rows were measured on."""
    rows = (row for data in results for row in data["rows"])
    return " or ".join(map(str, sorted({row["prompts"] for row in rows if "prompts" in row})))


def wrapped(sentence: str) -> str:
    """A sentence in lines of at most 120 characters."""
    return textwrap.fill(sentence, 120, break_long_words=False, break_on_hyphens=False)


def replace(text: str, name: str, table: str) -> str:
    """`text` with what stands between the markers of `name` replaced; as it is where it has none."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + table + "\n" + match[2], text)


def main() -> None:
    """Rewrites the documents. Raises ValueError for a table that none of them has a marker of."""
    documents = (README, BENCHMARKS_README, POLICIES_README)
    texts = {path: path.read_text() for path in documents}
    for name, table in TABLES.items():
        if not any(f"<!-- {name} -->\n" in text for text in texts.values()):
            raise ValueError(f"no document has '<!-- {name} -->' ... '<!-- end -->'")
        made = table.text()
        if made is not None:
            texts = {path: replace(text, name, made) for path, text in texts.items()}
    for path, text in texts.items():
        write_file(path, text)


if __name__ == "__main__":
    main()
