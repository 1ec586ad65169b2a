"""Every policy's plan and pictures on both demo pipelines, to see what a change of dcc changes: nothing, for most.

    python benchmarks/replay.py write FOLDER [--only REGEX]     with the dcc that python finds
    python benchmarks/replay.py compare FOLDER FOLDER

Runs eagerly, on one thread, so that equal arithmetic gives equal bits: each policy at its defaults (those that need a
trained mask or weights are left out), and two searched plans. A refusal counts too: its text is kept. `compare` prints
what differs and ends with an error where anything does.
Uses public names only, so that it runs on older versions as well (0.6.0 and later).
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file

import dcc
from dcc import policies
from dcc.errors import DccError

PIPELINES = ("mmdit", "unet")
PROMPTS = 2  # pictures per plan
SEARCHES: dict[str, dict[str, Any]] = {
    "search speedup=3": {"speedup": 3, "effort": "fast"},
    "search speedup=5": {"speedup": 5, "effort": "fast"},
}
app = typer.Typer(add_completion=False)


def cases() -> dict[str, dict[str, Any]]:
    """Arguments of `dcc.compile` by name: every policy that needs none of its own, and the searches."""
    free = [name for name in policies.names() if "required" not in policies.POLICIES[name].defaults.values()]
    return {name: {"policy": name} for name in free} | SEARCHES


def replay(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The plan as its file says it, the pictures [3, h, w] and the counts of one case; or why it is refused."""
    pipe, call = dcc.demo.load(name), dcc.demo.settings(name)
    prompts = dcc.demo.prompts("calib")[: 6 if "policy" not in arguments else 2]
    field = "transformer" if hasattr(pipe, "transformer") else "unet"
    try:
        dcc.compile(pipe, prompts, backend="eager", **arguments, **call)
    except DccError as error:
        return {"refusal": f"{type(error).__name__}: {error}"}
    net = getattr(pipe, field)
    pictures = []
    for index, prompt in enumerate(dcc.demo.prompts("test")[:PROMPTS]):
        generator = torch.Generator().manual_seed(1000 + index)
        pictures.append(pipe(prompt, generator=generator, output_type="pt", **call).images[0])
    return {"plan": net.plan, "summary": str(net.summary()).splitlines()[:3], "pictures": torch.stack(pictures)}


@app.command()
def write(folder: Path, only: Annotated[str, typer.Option(help="cases that match")] = "") -> None:
    """Replays every case and keeps what came out in FOLDER."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for pipeline in PIPELINES:
        for name, arguments in cases().items():
            stem = re.sub(r"\W+", "_", f"{pipeline} {name}")
            if not re.search(only, f"{pipeline} {name}") or (folder / f"{stem}.json").exists():
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = replay(pipeline, arguments)
            if "plan" in found:
                found["plan"].save(folder / f"{stem}.plan.json")
                save_file({"pictures": found["pictures"].contiguous()}, folder / f"{stem}.safetensors")
            facts = {"case": f"{pipeline} {name}", "refusal": found.get("refusal"), "summary": found.get("summary")}
            (folder / f"{stem}.json").write_text(json.dumps(facts, indent=1))
            typer.echo(f"{pipeline} {name}: {found.get('refusal') or 'done'}")


@app.command()
def compare(before: Path, after: Path) -> None:
    """Says which plans, pictures and refusals differ between two folders."""
    stems = sorted({path.name.removesuffix(".json") for path in before.glob("*.json") if ".plan." not in path.name})
    counts, problems = {"plans": 0, "pictures": 0, "refusals": 0}, []
    for stem in stems:
        facts = [json.loads((folder / f"{stem}.json").read_text()) for folder in (before, after)]
        if facts[0] != facts[1]:
            problems.append(f"{facts[0]['case']}: {facts[0]} became {facts[1]}")
            continue
        if facts[0]["refusal"]:
            counts["refusals"] += 1
            continue
        plans = [json.loads((folder / f"{stem}.plan.json").read_text()) for folder in (before, after)]
        if plans[0] != plans[1]:
            fields = [key for key in plans[0] | plans[1] if plans[0].get(key) != plans[1].get(key)]
            problems.append(f"{facts[0]['case']}: the plan differs in {', '.join(fields)}")
        pictures = [load_file(folder / f"{stem}.safetensors")["pictures"] for folder in (before, after)]
        if not torch.equal(*pictures):
            worst = float((pictures[0] - pictures[1]).abs().max())
            problems.append(f"{facts[0]['case']}: pictures differ by up to {worst:.2g}")
        counts["plans"] += 1
        counts["pictures"] += len(pictures[0])
    typer.echo(", ".join(f"{number} {kind}" for kind, number in counts.items()) + f": {len(problems)} differences")
    for problem in problems:
        typer.echo(f"- {problem}")
    raise typer.Exit(bool(problems))


if __name__ == "__main__":
    app()
