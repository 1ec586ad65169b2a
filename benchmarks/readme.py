"""Writes the measured tables of README.md and dcc/policies/README.md from benchmarks/results/, between their markers.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from dcc.policies import POLICIES

HERE = Path(__file__).parent
PARTS = (("cold", "captured"), ("cold", "lowered"), ("cold", "seconds"), ("warm", "lowered"), ("warm", "seconds"))
README = HERE.parent / "README.md"
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
    names = list(dict.fromkeys(row["name"] for case in data["cases"] for row in [*case["rows"], *case["failed"]]))
    lines = [
        "Each contestant in a process of its own, in turns with `torch.compile` of the uncached denoiser, "
        f"{median} (torch {machine['torch']}, {machine['cores']} CPU cores, random weights); "
        "in brackets the share of what the full steps alone imply, for dcc of what the plan's FLOPs imply:",
        "",
        "| contestant | " + " | ".join(f"{c['case']}, {c['forward_ms']:.0f} ms a call" for c in data["cases"]) + " |",
        "|---|" + "---|" * len(data["cases"]),
    ]
    for name in names:
        cells = []
        for case in data["cases"]:
            row = next((row for row in case["rows"] if row["name"] == name), None)
            cells.append(f"{row['ratio']:.2f}x ({row['share']:.2f})" if row else "does not run")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    steps = data["cases"][0]["full_steps"]
    return "\n".join([*lines, "", f"All compute {sum(steps)} full steps of {len(steps)}."])


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
        "Cache of a first-order forecast of all 57 blocks (256 + 32 tokens of width 256): every branch before its "
        f"gate {kept['branches']}; every block's residual {kept['blocks, apart']}, which coalescing makes "
        f"{kept['blocks']}.",
    ]
    return "\n".join(lines)


def hoisting(data: dict[str, Any]) -> str:
    """What no step changes: its share of FLOPs, the bytes that hold it, and the time saved."""
    machine = data["machine"]
    lines = [
        f"One all-compute plan with and without hoisting, called in turns, {data['backend']} backend, median of "
        f"{data['repeats'] * (data['steps'] - 1)} calls (torch {machine['torch']}, CPU, random weights, few blocks; "
        "tokens of prompt and sample in the released ratio). Shares at the released number of blocks stand "
        "beside, and those of what depends on the timestep alone, which is not hoisted:",
        "",
        "| family | FLOPs hoisted | call saved | hoisted at the released depth | held a request | timestep only: FLOPs "
        "| timestep only: weights |",
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
    lines = [
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
    lines = ["| steps | plan made for | full steps | PSNR | worst prompt |", "|---|---|---|---|---|"]
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
    lines = ["| pipeline | class | 2x | 3x | 5x |", "|---|---|---|---|---|"]
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


def replace(text: str, name: str, table: str) -> str:
    """`text` with the part between the markers of `name` replaced. Raises ValueError where they are missing."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no '<!-- {name} -->' ... '<!-- end -->'")
    return pattern.sub(lambda match: match[1] + table + "\n" + match[2], text)


def main() -> None:
    """Rewrites README.md."""
    text = README.read_text()
    times = json.loads((HERE / "results" / "compile_time.json").read_text())
    text = replace(text, "ratios", ratios(json.loads((HERE / "results" / "speed_ratios.json").read_text())))
    timed = [json.loads((HERE / "results" / f"latency_{name}.json").read_text()) for name in DENOISERS]
    text = replace(text, "latency", latency(timed))
    text = replace(text, "compile_time", compile_time(times))
    text = replace(text, "speed", speed(json.loads((HERE / "results" / "speed.json").read_text())))
    held = HERE / "results" / "hoisting.json"
    if held.exists():
        text = replace(text, "hoisting", hoisting(json.loads(held.read_text())))
    figures = [json.loads((HERE / "results" / f"zoo_{name}.json").read_text()) for name in DENOISERS]
    text = replace(text, "zoo", zoo(figures))
    measured = [HERE / "results" / f"quality_{name}.json" for name in DENOISERS]
    text = replace(text, "quality", quality([json.loads(file.read_text()) for file in measured if file.exists()]))
    other = HERE / "results" / "other_runs_mmdit.json"
    if other.exists():
        text = replace(text, "runs", runs(json.loads(other.read_text())))
    target = HERE / "results" / "promise.json"
    if target.exists():
        text = replace(text, "promise", promise(json.loads(target.read_text())))
    peers = HERE / "results" / "conformance.json"
    if peers.exists():
        text = replace(text, "conformance", conformance(json.loads(peers.read_text())))
    measured = [HERE / "results" / f"survey_{name}.json" for name in DENOISERS]
    if all(file.exists() for file in measured):
        results = [json.loads(file.read_text()) for file in measured]
        text = replace(text, "survey", survey(results))
        POLICIES_README.write_text(replace(POLICIES_README.read_text(), "methods", methods(results)))
    README.write_text(text)


if __name__ == "__main__":
    main()
