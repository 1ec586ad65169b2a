"""What a searched plan does away from home: at other step counts than it was made for, and with the guard.

python benchmarks/other_runs.py [mmdit]

Writes benchmarks/results/other_runs_<pipeline>.json. PSNR in dB of the final images of the test prompts to the uncached
ones of the same step count.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import measure
import torch

import dcc
from dcc.quality import psnr
from dcc.record.target import PipelineTarget

FULL = 7  # computed steps of the plan
OTHERS = (20, 40)
CALIBRATION, TEST, SEED, BATCH = 16, 32, 1000, 16


def images(pipe: Any, call: dict[str, Any], batch: int = BATCH) -> torch.Tensor:
    """Final images of the test prompts."""
    target, prompts = PipelineTarget(pipe, call), dcc.demo.prompts("test")[:TEST]
    chunks = [range(at, min(at + batch, TEST)) for at in range(0, TEST, batch)]
    return torch.cat([target.generate([prompts[i] for i in c], [SEED + i for i in c]).images for c in chunks])


def served(pipe: Any, plan: dcc.Plan, call: dict[str, Any], reference: torch.Tensor, **options: Any) -> dict[str, Any]:
    """PSNR and denoiser calls of a plan; one prompt at a time where the guard is on, since it acts on a whole batch."""
    dcc.compile(pipe, dcc.demo.prompts("calib")[:4], plan=plan, backend="eager", **options, **call)
    net = dcc.compiled(pipe)
    values = psnr(images(pipe, call, 1 if options else BATCH), reference)
    counts = net.sessions.counts
    dcc.restore(pipe)
    return {
        "psnr": statistics.mean(values),
        "psnr_worst": min(values),
        "computed": counts.computed / max(counts.sessions, 1),
        "guarded": counts.guarded,
        "mapped": counts.mapped,
    }


def main() -> None:
    """Plans for 28, 20 and 40 steps with the same number of full steps, then the first of them at 20 and 40."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("pipeline", nargs="?", default="mmdit", choices=dcc.demo.names())
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    pipe, name = dcc.demo.load(options.pipeline), options.pipeline
    home = dcc.demo.settings(name)
    prompts = dcc.demo.prompts("calib")[:CALIBRATION]
    rows: list[dict[str, Any]] = []
    plans = {}
    for steps in (home["num_inference_steps"], *OTHERS):
        call = home | {"num_inference_steps": steps}
        reference = images(pipe, call)
        plans[steps] = dcc.plan(pipe, prompts, speedup=steps / FULL, effort="fast", **call)
        rows.append({"steps": steps, "plan_for": steps} | served(pipe, plans[steps], call, reference))
        first = plans[home["num_inference_steps"]]
        if steps == home["num_inference_steps"]:
            rows.append({"steps": steps, "plan_for": steps, "guard": True})
            rows[-1] |= served(pipe, first, call, reference, guard=True)
        else:
            rows.append({"steps": steps, "plan_for": home["num_inference_steps"]})
            rows[-1] |= served(pipe, first, call, reference)
        print(*rows[-2:], sep="\n", flush=True)
        measure.write(f"other_runs_{name}", {"pipeline": name, "full_steps": FULL, "prompts": TEST, "rows": rows})


if __name__ == "__main__":
    main()
