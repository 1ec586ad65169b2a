"""Writes the README's measured tables from benchmarks/results/, between their markers.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
DENOISERS = {
    "mmdit": "multimodal DiT, 3 double and 5 single blocks, flow matching, 28 steps",
    "unet": "U-Net with cross-attention, guidance merged in the batch, DDIM, 50 steps",
}


def speed(data: dict[str, Any]) -> str:
    """Realised speed-up against the FLOPs-implied one."""
    machine = data["machine"]
    lines = [
        f"Both sides through the same Inductor path, side by side in one run, median of {data['repeats']} repeats "
        f"(torch {machine['torch']}, {machine['cores']} CPU cores, random weights):",
        "",
        "| denoiser, cached site | one forward | full steps | FLOPs-implied | realised | share |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        lines.append(
            f"| {row['case']} | {row['forward_ms']:.0f} ms | {row['full_steps']} of {row['steps']} "
            f"| {row['flops_implied']:.2f}x | {row['realised']:.2f}x | {row['share']:.2f} |"
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


def replace(text: str, name: str, table: str) -> str:
    """`text` with the part between the markers of `name` replaced. Raises ValueError where they are missing."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no '<!-- {name} -->' ... '<!-- end -->'")
    return pattern.sub(lambda match: match[1] + table + "\n" + match[2], text)


def main() -> None:
    """Rewrites README.md."""
    text = README.read_text()
    text = replace(text, "speed", speed(json.loads((HERE / "results" / "speed.json").read_text())))
    figures = [json.loads((HERE / "results" / f"zoo_{name}.json").read_text()) for name in DENOISERS]
    text = replace(text, "zoo", zoo(figures))
    README.write_text(text)


if __name__ == "__main__":
    main()
