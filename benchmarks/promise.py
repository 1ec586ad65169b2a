"""Whether a quality target holds on prompts that neither the search nor its held-back check has seen.

python benchmarks/promise.py

Writes benchmarks/results/promise.json. PSNR in dB of the final images of the test prompts to the uncached ones.
"""

from __future__ import annotations

import argparse
from typing import Any

import measure
import torch
from other_runs import TEST, images, served

import dcc

CALIBRATION = 12


def main() -> None:
    """Plans for the target on both pipelines, then runs the test prompts."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quality", type=float, default=32.0)
    arguments.add_argument("--effort", default="fast")
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name in dcc.demo.names():
        pipe, call = dcc.demo.load(name), dcc.demo.settings(name)
        prompts = dcc.demo.prompts("calib")[:CALIBRATION]
        plan = dcc.plan(pipe, prompts, quality=options.quality, effort=options.effort, **call)
        row = {"pipeline": name, "speedup": plan.speedup, "held_back": plan.measured["psnr_mean"]}
        rows.append(row | served(pipe, plan, call, images(pipe, call)))
        print(rows[-1], flush=True)
        measure.write("promise", {"quality": options.quality, "effort": options.effort, "prompts": TEST, "rows": rows})


if __name__ == "__main__":
    main()
