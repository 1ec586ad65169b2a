"""The table of methods: complete, honest about what runs where, and nothing but the model where it caches nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dcc.cli import app
from dcc.errors import PolicyError
from dcc.policies import POLICIES, names

from .demo_runs import STEPS, demo_run

pytestmark = pytest.mark.usefixtures("graphs")

SURVEY = (
    "DeepCache", "FasterDiffusion", "T-GATE", "FORA", "Delta-DiT", "PAB", "SmoothCache", "DiTFastAttn", "BlockDance",
    "Block Caching", "ECAD", "TeaCache", "FBCache", "DiCache", "MagCache", "EasyCache", "ERTACache", "TaoCache",
    "AdaCache", "Foresight", "BWCache", "DBCache", "DBPrune", "BAC", "ProfilingDiT", "TaylorSeer", "TaylorSeer-Lite",
    "HiCache", "AB-Cache", "FoCa", "GOC", "FreqCa", "HyCa", "ToCa", "DuCa", "RAS", "ClusCa", "SpeCa", "OmniCache",
    "FasterCache", "FEB-Cache", "MixCache", "ICC", "L2C", "HarmoniCa", "LazyDiT", "Skip-DiT", "FastCache",
)  # fmt: skip
# parameters for a short run of a small model; published defaults elsewhere
SHORT: dict[str, dict[str, Any]] = {
    "dbcache": {"front": 1, "warmup": 3, "threshold": 0.3},
    "dbprune": {"warmup": 3, "threshold": 0.3},
    "easycache": {"first": 2, "threshold": 0.2},
    "fbcache": {"threshold": 0.4},
    "teacache": {"coefficients": [1.0, 0.0], "threshold": 0.4},
    "dicache": {"threshold": 0.5},
    "ecad": {"population": 2, "generations": 0},
    "ditfastattn": {"delta": 0.4},
    "speca": {"min_skip": 1},
    "icc": {"rank": 4},  # at the published rank these layers cost more corrected than computed
    "mixcache": {"threshold": 0.5, "block_threshold": 0.5},
}
LEARNED = {"l2c": 1.0, "harmonica": 1.0, "lazydit": 0.0}  # a mask of this number reuses everything
WEIGHTS = ("fastcache",)  # tested with weights of its own in test_correctors
REFUSALS = {
    "mmdit": {
        "deepcache": "U-Net with a skip connection 0",
        "faster_diffusion": "U-Net with skip connections",
        "t_gate": "needs cross-attention",
    },
    "unet": {
        "delta_dit": "residual stream",
        "blockdance": "residual stream|values",
        "ras": "needs an output \\[batch, tokens, channels\\]",
    },
}
NEUTRAL: dict[str, dict[str, Any]] = {
    "faster_diffusion": {"key_steps": list(range(STEPS))},
    "pab": {"attention": 1, "cross": 1},
    "smoothcache": {"alpha": 0.0},
    "ecad": {"mask": "ones"},
    "t_gate": {"gate_step": STEPS, "sp_interval": 1},
    "ditfastattn": {"delta": 0.0},
    "teacache": {"threshold": 0.0, "coefficients": [1.0, 0.0]},
    "adacache": {"codebook": {0.0: 2}},
    "foresight": {"gamma": 0.0},
    "mixcache": {"threshold": 0.0, "block_threshold": 0.0},
    "dbcache": {"threshold": 0.0, "front": 1, "warmup": 1},
    "block_caching": {"delta": 0.0},
    "speca": {"first": STEPS},
    "ras": {"ratio": 1.0},
    "fastercache": {"interval": 1, "guidance_interval": 1},
    "l2c": {"mask": 0.0},
    "harmonica": {"mask": 0.0},
    "lazydit": {"mask": 1.0},
}


def filled(policy: str, pipeline: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Numbers that stand for a whole mask, written out for the branches of this pipeline."""
    value = {"ones": 1}.get(parameters.get("mask"), parameters.get("mask"))
    if value is None:
        return parameters
    run = demo_run(pipeline)
    group = "branches" if pipeline == "mmdit" else "innermost"
    return parameters | {"mask": [[value] * len(run.sites.select(group))] * STEPS}


def neutral(policy: str) -> dict[str, Any]:
    if policy in NEUTRAL:
        return NEUTRAL[policy]
    return {"interval": 1} if "interval" in POLICIES[policy].parameters else {"threshold": 0.0}


def test_every_method_of_the_survey_has_one_row():
    titles = [method.title for method in POLICIES.values()]
    assert len(set(titles)) == len(titles)
    assert [title for title in SURVEY if title not in titles] == []


@pytest.mark.parametrize("name", names())
def test_a_row_says_what_a_user_needs(name):
    facts = POLICIES[name].facts()
    assert all(facts[key] for key in ("title", "sites", "trigger", "predictor", "needs", "syncs", "source"))
    assert facts["checked"] in ("C", "C3", "D", "own")
    assert facts["kind"] in ("static", "timestep_adaptive", "layer_adaptive", "predictive", "hybrid")
    assert POLICIES[name].make.__doc__


@pytest.mark.parametrize("pipeline", ["mmdit", "unet"])
@pytest.mark.parametrize("name", [name for name in names() if name not in WEIGHTS])
def test_it_runs_or_says_why_not(name, pipeline):
    run = demo_run(pipeline)
    captured = run.base.families[0].captured
    batch = captured.batch
    parameters = SHORT.get(name, {})
    if name in LEARNED:
        parameters = filled(name, pipeline, {"mask": LEARNED[name]})
    if name in REFUSALS[pipeline]:
        with pytest.raises(PolicyError, match=REFUSALS[pipeline][name]):
            run.plan(name, **parameters)
        return
    net = run.base.with_plan(run.plan(name, **parameters))
    images = run.images(net, prompts=("a red circle",))
    counts = net.sessions.counts
    assert images.isfinite().all()
    assert counts.missed == 0
    assert counts.computed + counts.forecast == STEPS
    assert counts.forecast > 0
    spent = counts.flops_uncached / counts.flops if counts.flops else net.plan.speedup
    assert spent > 1.0
    assert captured.batch == batch  # nothing fixed the symbolic size of the batch
    assert net.sessions.streams == {}


@pytest.mark.parametrize("name", [name for name in names() if name not in WEIGHTS])
def test_what_caches_nothing_is_the_model_bit_for_bit(name):
    pipeline = "unet" if name in REFUSALS["mmdit"] else "mmdit"
    run = demo_run(pipeline)
    images, net = run(name, **filled(name, pipeline, neutral(name)))
    assert net.sessions.counts.forecast == 0
    assert torch.equal(images, run.expected)


def test_the_command_lists_all_within_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["policies"])
    assert result.exit_code == 0
    assert all(name in result.output for name in names())
    assert max(map(len, result.output.splitlines())) <= 80


def test_the_command_shows_one_and_gives_json(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    result = CliRunner().invoke(app, ["policies", "teacache"])
    assert "modulated input" in result.output and "threshold=" in result.output and "0.25" in result.output
    rows = json.loads(CliRunner().invoke(app, ["policies", "--json"]).output)
    assert [row["name"] for row in rows] == names()
    assert next(row for row in rows if row["name"] == "l2c")["parameters"]["mask"] == "required"
    wrong = CliRunner().invoke(app, ["policies", "magic"])
    assert wrong.exit_code == 1 and "unknown policy 'magic'" in wrong.stderr
