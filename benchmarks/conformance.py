"""Whether dcc's policies decide and draw what other libraries' own implementations do, at the same settings.

    python benchmarks/conformance.py [--only REGEX]

Runs each library's cache and dcc's policy of the same method one after the other on test prompts of a demo pipeline,
one prompt at a time, and compares which steps compute, from the FLOPs of every denoiser call, and the final images.
Writes benchmarks/results/conformance.json after every row.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Annotated, Any

import measure
import peers
import torch
import typer
from quality import SEED, counted
from subjects import DoesNotRun, Subject

import dcc
from dcc.quality import mean_psnr, psnr

PROMPTS = 4
EQUAL = 100.0  # dB; images that agree better are equal to float tolerance


@dataclass(frozen=True)
class Pair:
    """A library's cache and the policy that should do the same."""

    pipeline: str
    name: str
    install: Callable[..., Any]
    settings: dict[str, Any]
    policy: str
    parameters: dict[str, Any] = field(default_factory=dict)
    ratios: bool = False  # MagCache: its own calibrated ratios go to the policy


def pairs() -> list[Pair]:
    """What is compared."""
    found = []
    for threshold in (0.1, 0.3):
        settings = {"threshold": threshold}
        found.append(Pair("mmdit", "diffusers FirstBlockCache", peers.first_block_cache, settings, "fbcache", settings))
    for order in (1, 2):
        settings = {"interval": 5, "order": order, "place": "branches"}
        mask = [int(s < 3 or s % 5 == 4) for s in range(28)]  # the hook computes steps 0 to 2, 4, 9, 14 ...
        parameters = {"order": order, "steps_mask": mask, "site": "branches"}
        found.append(Pair("mmdit", "diffusers TaylorSeer", peers.taylorseer, settings, "taylorseer", parameters))
    settings = {"threshold": 0.06, "max_skip": 3, "retention": 0.2}
    parameters = {"threshold": 0.06, "max_skip": 3, "retention_ratio": 0.2}
    found.append(Pair("mmdit", "diffusers MagCache", peers.mag_cache, settings, "magcache", parameters, ratios=True))
    settings = {"skip": 2, "everywhere": True}
    found.append(Pair("mmdit", "diffusers PAB", peers.attention_broadcast, settings, "pab", {"window": (-1, 1001)}))
    for blocks, warmup, threshold, calibrator, order in (
        ((1, 0), 4, 0.1, "", 0),
        ((2, 0), 4, 0.2, "", 0),
        ((1, 1), 4, 0.2, "", 0),
        ((1, 0), 4, 0.2, "taylorseer 1", 1),
    ):
        settings = {"blocks": blocks, "warmup": warmup, "threshold": threshold, "calibrator": calibrator}
        parameters = {"front": blocks[0], "back": blocks[1], "warmup": warmup, "threshold": threshold, "order": order}
        found.append(Pair("mmdit", "cache-dit DBCache", peers.cache_dit_cache, settings, "dbcache", parameters))
    for interval in (3, 5):
        settings = {"interval": interval, "branch": 0}
        found.append(Pair("unet", "DeepCache", peers.deepcache, settings, "deepcache", {"interval": interval}))
    return found


def main(only: Annotated[str, typer.Option(help="Pairs whose name matches this.")] = "") -> None:
    """Compares all pairs."""
    torch.set_num_threads(1)
    subjects: dict[str, Subject] = {}
    rows = []
    for pair in pairs():
        if only and not re.search(only, pair.name):
            continue
        subject = subjects.setdefault(pair.pipeline, Subject(pair.pipeline))
        rows.append(compare(subject, pair))
        print(rows[-1], flush=True)
        versions = {name: metadata.version(name) for name in ("torch", "diffusers", "cache-dit", "DeepCache")}
        measure.write("conformance", {"prompts": PROMPTS, "versions": versions, "rows": rows})


def compare(subject: Subject, pair: Pair) -> dict[str, Any]:
    """A row: decisions and images of both, and how far they are apart."""
    facts = {"pipeline": pair.pipeline, "peer": pair.name, "settings": pair.settings, "policy": pair.policy}
    parameters = pair.parameters | ({"ratios": peers.mag_ratios(subject)} if pair.ratios else {})
    facts["parameters"] = pair.parameters
    try:
        theirs, their_steps = run(subject, subject.fresh(), lambda p: pair.install(subject, p, **pair.settings))
        ours, our_steps = run(subject, subject.fresh(), lambda p: compiled(subject, p, pair.policy, parameters))
    except (DoesNotRun, dcc.errors.DccError) as reason:
        return facts | {"error": str(reason)}
    plain, _ = run(subject, subject.fresh(), contextlib.nullcontext)
    agree = psnr(ours, theirs, 1.0)
    return facts | {
        "same_decisions": our_steps == their_steps,
        "computed_steps": [[sum(steps) for steps in own] for own in (our_steps, their_steps)],
        "psnr_between": min(min(agree), EQUAL),
        "psnr_to_uncached": [mean_psnr(psnr(own, plain, 1.0)) for own in (ours, theirs)],
    }


@contextlib.contextmanager
def compiled(subject: Subject, pipe: Any, policy: str, parameters: dict[str, Any]):
    """The policy on a pipeline, on the eager backend."""
    dcc.compile(pipe, dcc.demo.prompts("calib")[:2], policy=policy, backend="eager", **parameters, **subject.call)
    yield
    dcc.restore(pipe)


def run(subject: Subject, pipe: Any, install: Callable[[Any], Any]) -> tuple[torch.Tensor, list[list[int]]]:
    """Images of the test prompts, one at a time, and for each prompt a 1 for every step that computed."""
    images, decisions = [], []
    with install(pipe):
        target = subject.target(pipe)
        for index, prompt in enumerate(dcc.demo.prompts("test")[:PROMPTS]):
            with counted(target.module) as flops:
                images.append(target.generate([prompt], [SEED + index]).images)
            middle = (max(flops) + min(flops)) / 2 if max(flops) > 1.02 * min(flops) else 0
            decisions.append([int(count > middle) for count in flops])
    return torch.cat(images), decisions


if __name__ == "__main__":
    typer.run(main)
