"""Contestants of quality.py: every method of the survey that dcc has, at a few settings from careful to bold.

A setting counts at every budget that it reaches. A method that has no entry here runs with its published defaults.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from subjects import Contestant, DoesNotRun, Subject

import dcc
from dcc.errors import DccError
from dcc.policies import POLICIES

FAMILY = "survey: "


def spread(name: str, values: Sequence[Any], **fixed: Any) -> list[dict[str, Any]]:
    """Settings that differ in one parameter."""
    return [fixed | {name: value} for value in values]


INTERVALS = (2, 4, 6)
EVERY = spread("interval", INTERVALS)
THRESHOLDS = (0.08, 0.3)
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "interval": EVERY,
    "deepcache": EVERY,
    "faster_diffusion": [{}, {"key_steps": [0, 2, 5, 12, 20]}],
    "fora": EVERY,
    "frdiff": EVERY,
    "delta_dit": spread("interval", (2, 4), share=0.75),
    "pab": [*spread("attention", (2, 4), window=(-1, 1001)), {"attention": 4, "mlp": 4, "window": (-1, 1001)}],
    "smoothcache": spread("alpha", (0.08, 0.18)),
    "blockdance": spread("interval", (2, 4)),
    "skip_dit": spread("interval", (2, 4), window=(-1, 1001)),
    "ecad": [{"speedup": 2.0}],
    "taylorseer": EVERY,
    "taylorseer_lite": EVERY,
    "hicache": EVERY,
    "ab_cache": EVERY,
    "foca": EVERY,
    "goc": EVERY,
    "freqca": EVERY,
    "hyca": EVERY,
    "teacache": spread("threshold", (0.03, 0.15)),
    "fbcache": spread("threshold", THRESHOLDS),
    "dicache": spread("threshold", THRESHOLDS),
    "magcache": [{"threshold": t, "max_skip": 8, "retention_ratio": 0.1} for t in (0.06, 0.6)],
    "easycache": spread("threshold", (0.05, 0.2), first=2),
    "ertacache": spread("threshold", (0.05, 0.2)),
    "taocache": spread("interval", (3, 6), start=0.1),
    "block_caching": spread("delta", (0.1, 0.3)),
    "adacache": [{}, {"codebook": {0.02: 6, 0.05: 4, 0.1: 3, 0.2: 2}}],
    "foresight": [{"gamma": g, "refresh": r} for g, r in ((0.5, 2), (2.0, 5))],
    "bwcache": [{"threshold": t, "reuse": r} for t, r in ((0.1, 0.05), (0.25, 0.2))],
    "dbcache": [{"threshold": t, "front": 1, "warmup": 4} for t in (0.1, 0.3)]
    + [{"threshold": t, "front": 1, "warmup": 4, "order": 1} for t in (0.1, 0.3)],
    "dbprune": [{"threshold": t, "warmup": 4, "max_continuous": 4} for t in (0.1, 0.25)],
    "bac": EVERY,
    "feb_cache": spread("interval", (3, 5)),
    "profiling_dit": spread("interval", (2, 4), first=3),
    "speca": [{"base": b, "decay": 0.3} for b in (0.03, 0.3)],
    "omnicache": EVERY,
    "mixcache": [{"threshold": t, "interval": n} for t, n in ((0.1, 2), (0.3, 4))],
    "toca": EVERY,
    "duca": EVERY,
    "clusca": EVERY,
    "ras": [{}],
    "fastercache": [{}],
    "t_gate": [{}],
    "ditfastattn": [{}],
    "icc": spread("interval", (2, 4), rank=8),
}
SKIPPED = ("l2c", "harmonica", "lazydit", "fastcache")  # need weights or masks that were trained for a model


def methods(subject: Subject) -> Iterator[Contestant]:
    """All of them."""
    for method in POLICIES.values():
        if method.name in SKIPPED:
            continue
        for parameters in SETTINGS.get(method.name, [{}]):
            text = " ".join(f"{name}={value}" for name, value in parameters.items())
            yield Contestant(
                f"{method.title} {text}".rstrip(),
                FAMILY + method.kind,
                policy,
                {"policy": method.name, "parameters": parameters},
                dynamic=method.syncs != "0",
                shared=True,
            )


@contextlib.contextmanager
def policy(subject: Subject, pipe: Any, policy: str, parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A policy on the eager backend."""
    try:
        net = subject.compiled.with_plan(subject.plan(policy, parameters))
    except DccError as error:
        raise DoesNotRun(str(error)) from error
    subject.target(pipe).install(net)
    try:
        yield {}
    finally:
        dcc.restore(pipe)
