"""Predictive policies: masks and coefficients by hand, real runs, and TaylorSeer against diffusers' own hook."""

import pytest
import torch
from diffusers import TaylorSeerCacheConfig

import dcc
from dcc.errors import PolicyError
from dcc.plans.plan import make_plan
from dcc.plans.predictors import Predictor, Switched
from dcc.policies import POLICIES, Setting, make_policy

from .demo_runs import PROMPTS, SEEDS, STEPS, demo_run

pytestmark = pytest.mark.usefixtures("graphs")

EVERY_FIFTH = "111000010000100"  # three steps first
NAMES = ("taylorseer", "taylorseer_lite", "hicache", "ab_cache", "foca", "femo", "goc")


def digits(values):
    return "".join(map(str, values))


def bare(steps=15, sites=("hidden",)):
    """A setting without a model, for policies that ask for no more than names of sites."""
    return Setting(range(steps), sites=dict.fromkeys(sites))


def one(policy, setting=None, **parameters):
    (cached,) = make_policy(policy, setting or bare(), parameters).caches
    return cached


@pytest.mark.parametrize(
    ("policy", "parameters", "site", "mask", "predictor"),
    [
        ("taylorseer", {}, "auto", EVERY_FIFTH, Predictor("taylor", 1)),
        ("taylorseer_lite", {}, "hidden", EVERY_FIFTH, Predictor("taylor", 2)),
        ("hicache", {}, "auto", EVERY_FIFTH, Predictor("hermite", 2, (("sigma", 0.5),))),
        ("foca", {}, "auto", EVERY_FIFTH, Predictor("foca", 2)),
        ("femo", {}, "auto", EVERY_FIFTH, Predictor("momentum", 3, (("beta", 0.5),))),
        ("ab_cache", {}, "output", "111001001001001", Predictor("adams_bashforth", 1)),
        ("ab_cache", {"order": 3, "interval": 4, "first": 1}, "output", "100010001000100", Predictor("newton", 2)),
    ],
)
def test_a_schedule_and_a_predictor(policy, parameters, site, mask, predictor):
    cached = one(policy, **parameters)
    assert (cached.site, digits(cached.mask)) == (site, mask)
    if predictor.name == "newton":  # the same numbers
        assert cached.predictor.coefficients(10, [8, 4, 0]) == predictor.coefficients(10, [8, 4, 0])
    else:
        assert cached.predictor == predictor


def test_taylorseer_lite_without_a_value_after_the_last_block_takes_the_output():
    assert one("taylorseer_lite", bare(sites=())).site == "output"


def test_goc_extrapolates_at_its_gradient_steps_and_copies_elsewhere():
    cached = one("goc", bare(9), gradient_steps=[3, 5])
    assert (cached.site, digits(cached.mask)) == ("branches", "101010101")
    plan = make_plan(
        model="m", scheduler="s", levels=range(9), sites=["a"], schedule=[[v] for v in cached.mask],
        predictors=[cached.predictor], policy="goc", parameters={},
    )  # fmt: skip
    forecasts = {step: row[0] for step, row in enumerate(plan.coefficients) if row[0]}
    lean = pytest.approx((2.2, -1.2))
    assert forecasts == {1: (1.0,), 3: lean, 5: lean, 7: (1.0,)}


def test_goc_extrapolates_in_the_first_half_unless_told():
    cached = one("goc", bare(10), eta=0.5)
    assert isinstance(cached.predictor, Switched)
    assert cached.predictor.steps == frozenset(range(5))
    assert cached.predictor.coefficients(3, [2, 0]) == [1.5, -0.5]
    assert cached.predictor.coefficients(7, [6, 4]) == [1.0]


@pytest.mark.parametrize("policy", NAMES)
def test_interval_one_is_all_compute(policy):
    assert set(one(policy, interval=1).mask) == {1}


@pytest.mark.parametrize("policy", NAMES)
def test_bad_intervals_are_refused(policy):
    for value in (0, -1, 2.5, "3"):
        with pytest.raises(PolicyError, match="interval="):
            one(policy, interval=value)


@pytest.mark.parametrize(
    ("policy", "parameters", "message"),
    [
        ("hicache", {"sigma": 1.5}, r"sigma=1.5 must be a number from 0 to 1"),
        ("hicache", {"order": 0}, r"order=0: the hermite predictor takes an order from 1 to 4"),
        ("femo", {"beta": -0.1}, r"beta=-0.1 must be a number from 0 to 1"),
        ("ab_cache", {"order": 1}, r"order=1 must be a whole number of 2 or more"),
        ("ab_cache", {"order": 6}, r"order=6 must be a number from 2 to 5"),
        ("goc", {"eta": "much"}, r"eta='much' must be of type float"),
        ("goc", {"gradient_steps": [3, 15]}, r"\[15\] are no steps of a run of 15"),
        ("foca", {"order": 1}, r"takes no parameter 'order'"),
    ],
)
def test_bad_parameters_are_refused(policy, parameters, message):
    with pytest.raises(PolicyError, match=message):
        one(policy, **parameters)


def test_every_one_says_where_it_is_from():
    for name in NAMES:
        assert POLICIES[name].kind == "predictive"
        assert POLICIES[name].source and POLICIES[name].checked in ("C", "C3", "D")
        assert POLICIES[name].syncs == "0"


# measured, less 1 dB; forecasts with the wrong sign of the distance are 3 to 15 dB lower
FLOORS = {
    "taylorseer": {"mmdit": 47.8, "unet": 35.5},
    "taylorseer_lite": {"mmdit": 44.9, "unet": 33.6},
    "hicache": {"mmdit": 45.4, "unet": 37.9},
    "ab_cache": {"mmdit": 49.9, "unet": 31.9},
    "foca": {"mmdit": 47.3, "unet": 29.6},
    "femo": {"mmdit": 45.8, "unet": 36.4},
}


@pytest.fixture(scope="module", params=["mmdit", "unet"])
def run(request):
    return demo_run(request.param)


@pytest.mark.parametrize("policy", FLOORS)
def test_images_stay_near_at_half_the_steps(run, policy):
    images, net = run(policy, interval=3)
    assert run.psnr(images) > FLOORS[policy][run.name]
    assert digits(net.plan.steps_mask) == "111001001001"
    assert net.plan.speedup > 1.8
    counts = net.sessions.counts
    assert (counts.computed, counts.forecast, counts.missed) == (6, 6, 0)  # both prompts share each call


def test_a_forecast_beats_a_copy_on_the_same_steps(run):
    taylor, net = run("taylorseer", interval=3)
    copied, _ = run("interval", steps_mask=net.plan.steps_mask)
    assert run.psnr(taylor) > run.psnr(copied) + 2


def test_goc_beats_fora(run):
    """The method's claim: the same branches and steps, with the gradient added early in the run."""
    goc, _ = run("goc")
    fora, _ = run("fora", interval=2)
    assert run.psnr(goc) > run.psnr(fora) + 0.5


def test_interval_one_is_the_original_bit_for_bit(run):
    images, net = run("hicache", interval=1)
    assert torch.equal(images, run.expected)
    assert net.sessions.counts.forecast == 0


# the hook computes the steps before `disable_cache_before_step`, and where (step - it - 1) % interval is 0
BRANCHES = {
    "cache_identifiers": [
        r"transformer_blocks\.\d+\.(attn|ff|ff_context)",
        r"single_transformer_blocks\.\d+\.proj_out",
    ],
    "skip_predict_identifiers": [r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"],
}
PLACES = {"branches": BRANCHES, "output": {"use_lite_mode": True}}


@pytest.mark.parametrize("site", PLACES)
@pytest.mark.parametrize(("interval", "order", "first"), [(5, 1, 3), (5, 2, 3), (3, 1, 1), (4, 3, 2)])
def test_taylorseer_draws_what_the_hook_of_diffusers_draws(site, interval, order, first):
    """The same decisions at every step and the same images to rounding, while both change them by far more."""
    run = demo_run("mmdit")
    pipe = dcc.demo.load("mmdit")
    computed, step = [], [-1]
    inner = pipe.transformer.transformer_blocks[0].attn.to_q
    pipe.transformer.register_forward_pre_hook(lambda *args: step.__setitem__(0, step[0] + 1))
    inner.register_forward_pre_hook(lambda *args: computed.append(step[0]))
    pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=interval,
            max_order=order,
            disable_cache_before_step=first,
            taylor_factors_dtype=torch.float32,
            **PLACES[site],
        )
    )
    theirs = dcc.record.target.PipelineTarget(pipe, run.call).generate(PROMPTS, SEEDS).images

    mask = [int(s < first or (s - first - 1) % interval == 0) for s in range(STEPS)]
    assert computed == [s for s in range(STEPS) if mask[s]]
    ours, net = run("taylorseer", order=order, steps_mask=mask, site=site)
    assert net.plan.steps_mask == mask
    assert (theirs - run.expected).abs().max() > 0.01
    assert (ours - theirs).abs().max() < 2e-5
