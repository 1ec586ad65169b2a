"""Searches a plan for every budget on the demo pipelines; benchmarks/quality.py measures them on other prompts.

python benchmarks/plans.py mmdit unet

Writes benchmarks/results/plans/<pipeline>_<speed-up>x.json, and skips those that are there unless --refresh is given.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import dcc

FOLDER = Path(__file__).parent / "results" / "plans"
SPEEDUPS = (2, 3, 4, 5, 7)


def main() -> None:
    """One plan per budget, each from scratch."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("pipelines", nargs="+", choices=dcc.demo.names())
    arguments.add_argument("--speedups", type=int, nargs="+", default=SPEEDUPS)
    arguments.add_argument("--prompts", type=int, default=20, help="calibration prompts, those held back included")
    arguments.add_argument("--effort", default="normal")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--refresh", action="store_true")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in options.pipelines:
        pipe = dcc.demo.load(name)
        prompts = dcc.demo.prompts("calib")[: options.prompts]
        for speedup in options.speedups:
            file = FOLDER / f"{name}_{speedup}x.json"
            if file.exists() and not options.refresh:
                continue
            start = time.perf_counter()
            plan = dcc.plan(pipe, prompts, speedup=speedup, effort=options.effort, **dcc.demo.settings(name))
            plan.save(file)
            print(f"{file.name}: {time.perf_counter() - start:.0f} s\n{plan}", flush=True)


if __name__ == "__main__":
    main()
