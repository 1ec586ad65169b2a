"""Whole-step schedules from calibration: masks and coefficients by hand, real runs, and MagCache against diffusers.

Policies of this class that decide at run time are tested in test_triggered.py.
"""

import ast
import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import MagCacheConfig
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, MagCacheHeadHook, MagCacheState

import dcc
from dcc.errors import PolicyError
from dcc.plans.predictors import Predictor
from dcc.policies import POLICIES, Setting, make_policy
from dcc.policies.base import gram_of
from dcc.record.target import PipelineTarget

from .demo_runs import CALIBRATION, PROMPTS, SEEDS, STEPS, demo_run

pytestmark = pytest.mark.usefixtures("graphs")

PUBLISHED = [
    1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562, 1.00781,
    1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062,
]  # fmt: skip


def digits(values):
    return "".join(map(str, values))


def measured(series, site="delta", streams=1):
    """A setting whose profile holds the Gram matrix of a series of vectors [steps, n], for each stream."""
    series = np.atleast_2d(np.asarray(series, dtype=float).T).T
    gram = torch.from_numpy(series @ series.T)
    profile = SimpleNamespace(matrix=lambda name, stream: gram, streams=tuple(map(str, range(streams))))
    return Setting(range(len(series)), dict.fromkeys([site]), lambda: profile)


def one(policy, setting, **parameters):
    (cached,) = make_policy(policy, setting, parameters).caches
    return cached


def mag(steps, **parameters):
    return digits(one("magcache", Setting(range(steps)), **parameters).mask)


# MagCache


@pytest.mark.parametrize("ratios", [PUBLISHED, [1.0, *PUBLISHED]], ids=["27", "28"])
def test_magcache_of_the_published_curve(ratios):
    mask = mag(28, threshold=0.24, max_skip=5, retention_ratio=0.1, forbidden=[11], ratios=ratios)
    assert mask == "1110010001010000010000010010"


def test_magcache_without_its_forbidden_step_goes_on():
    mask = mag(28, threshold=0.24, max_skip=5, retention_ratio=0.1, ratios=PUBLISHED)
    assert mask[:11] == "11100100010" and mask[11] == "0"


@pytest.mark.parametrize(
    ("ratios", "parameters", "expected"),
    [
        ([1.0] * 10, {"retention_ratio": 0.2, "max_skip": 3}, "1100010001"),
        ([1.0] * 10, {"retention_ratio": 0.26, "max_skip": 3}, "1110001000"),  # 2.6 rounds to 3
        ([1.0] * 10, {"retention_ratio": 0.0, "max_skip": 9}, "1000000000"),
        ([1.1] * 10, {"threshold": 0.25}, "1101010101"),  # 0.1, then 0.1 + 0.21
        ([1.1] * 10, {"threshold": 0.35}, "1100100100"),
        ([0.5, 2.0] * 5, {"threshold": 0.75, "max_skip": 9}, "1100110011"),  # 0.5, 0.5 + 0, then 0.5 more
        ([1.5] * 6, {"threshold": 0.5, "retention_ratio": 0.0}, "101010"),
        ([1.5] * 6, {"threshold": 0.5, "retention_ratio": 0.0, "strict": True}, "111111"),
        ([1.0] * 6, {"retention_ratio": 0.0, "max_skip": 5, "forbidden": [2, 3]}, "101100"),
        ([1.0] * 6, {"max_skip": 0}, "111111"),
        ([1.0] * 6, {"threshold": 0}, "111111"),
        ([1.0] * 6, {"retention_ratio": 1.0}, "111111"),
    ],
)
def test_magcache_by_hand(ratios, parameters, expected):
    assert mag(len(ratios), ratios=ratios, **parameters) == expected


def decisions_of_diffusers(steps, threshold, max_skip, retention_ratio, ratios):
    """Which steps the hook of diffusers computes: its own code, around a block that does nothing."""
    config = MagCacheConfig(threshold, max_skip, retention_ratio, steps, mag_ratios=list(ratios))
    manager = StateManager(MagCacheState, (), {})
    manager.set_context(SimpleNamespace(name="cond"))
    hook = MagCacheHeadHook(manager, config)
    hook._metadata = SimpleNamespace(
        hidden_states_argument_name="x",
        _get_parameter_from_args_kwargs=lambda name, args, kwargs: args[0],
        return_encoder_hidden_states_index=None,
    )
    hook.fn_ref = SimpleNamespace(original_forward=lambda x: x)
    decisions = []
    for step in range(steps):
        state = manager.get_state()
        state.step_index = step
        hook.new_forward(None, torch.zeros(1))
        decisions.append(int(state.should_compute))
        if state.should_compute:
            state.previous_residual = torch.zeros(1)
    return digits(decisions)


@pytest.mark.parametrize("steps", [8, 20, 28, 50])
@pytest.mark.parametrize(("threshold", "max_skip", "retention"), [(0.06, 3, 0.2), (0.24, 5, 0.1), (0.5, 6, 0.05)])
def test_magcache_decides_as_the_hook_of_diffusers(steps, threshold, max_skip, retention):
    """At the curve's own number of steps and at others, for which both take the nearest."""
    ratios = FLUX_MAG_RATIOS.tolist()
    theirs = decisions_of_diffusers(steps, threshold, max_skip, retention, ratios)
    ours = mag(steps, threshold=threshold, max_skip=max_skip, retention_ratio=retention, ratios=ratios)
    assert ours == theirs
    assert 0 < theirs.count("0") < steps


def test_magcache_takes_ratios_from_the_norms_of_the_profile():
    sizes = np.array([8.0, 4.0, 4.0, 4.0, 6.0, 6.0, 6.0, 3.0])  # ratios 0.5, 1, 1, 1.5, 1, 1, 0.5
    series = sizes[:, None] * np.eye(8)  # whatever the direction
    cached = one("magcache", measured(series, "stack"), site="stack", threshold=0.6, max_skip=9, retention_ratio=0.1)
    # step 1 drifts 0.5, step 2 would make it 1; step 3 stays, step 4 drifts 0.5; step 5 would make it 1, 6 stays
    assert digits(cached.mask) == "10100100"
    assert cached.predictor == Predictor("copy")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"ratios": []}, "ratios must be finite numbers"),
        ({"ratios": [1.0, float("nan")]}, r"ratios=list \[1\.0, nan\] must be of type list"),
        ({"ratios": [1.0, "2"]}, r"ratios=list \[1\.0, .2.\] must be of type list"),
        ({"ratios": [1.0] * 8, "threshold": -1}, "threshold=-1"),
        ({"ratios": [1.0] * 8, "max_skip": 1.5}, r"max_skip=1\.5"),
        ({"ratios": [1.0] * 8, "retention_ratio": 2}, "retention_ratio=2"),
        ({}, "needs the sites|needs a calibration profile"),
    ],
)
def test_magcache_refuses(parameters, message):
    with pytest.raises(PolicyError, match=message):
        mag(8, **parameters)


# ERTACache


def test_ertacache_copies_while_calibration_was_close_and_scales():
    values = [10.0, 10.5, 11.0, 11.5, 14.0, 14.0, 13.0, 9.0]
    cached = one("ertacache", measured(values), threshold=0.1)
    # |10 - 11| / 11 is 0.09, |10 - 11.5| / 11.5 is 0.13; |11.5 - 14| / 14 is 0.18; |14 - 13| / 13 is 0.08
    assert digits(cached.mask) == "10011001"
    coefficients = [cached.predictor.coefficients(s, [0]) for s in (1, 2, 5, 6)]
    assert coefficients == [[pytest.approx(c)] for c in (1.05, 1.1, 1.0, 13 / 14)]


def test_ertacache_scales_by_least_squares():
    generator = np.random.default_rng(0)
    series = 1.0 + 0.01 * generator.standard_normal((6, 40))
    cached = one("ertacache", measured(series), threshold=0.5)
    assert digits(cached.mask) == "100000"
    for step in range(1, 6):
        (scale,) = cached.predictor.coefficients(step, [0])
        (best,) = np.linalg.lstsq(series[:1].T, series[step], rcond=None)[0]
        assert scale == pytest.approx(best)


def test_ertacache_needs_an_output_like_the_latent():
    with pytest.raises(PolicyError, match="shaped like the latent"):
        one("ertacache", measured([1.0, 2.0], "stack"))


# TaoCache


def test_taocache_schedule():
    cached = one("taocache", measured(np.arange(1.0, 13.0), "output"), interval=3, start=0.3)
    assert (cached.site, digits(cached.mask)) == ("output", "111100100100")
    assert digits(one("taocache", measured(np.arange(1.0, 13.0), "output"), start=0.0).mask) == "110010010010"


def test_taocache_projects_on_the_last_increment():
    """What it leaves is orthogonal to the increment, so no other multiple of it is nearer."""
    series = np.random.default_rng(0).standard_normal((12, 7))
    cached = one("taocache", measured(series, "output"), interval=3)
    anchors = [step for step, full in enumerate(cached.mask) if full]
    for step in set(range(12)) - set(anchors):
        newest, before = [a for a in anchors if a < step][:-3:-1]
        first, second = cached.predictor.coefficients(step, [newest, before])
        missed = series[step] - first * series[newest] - second * series[before]
        assert missed @ (series[newest] - series[before]) == pytest.approx(0, abs=1e-9)
        assert first + second == pytest.approx(1)


def test_taocache_is_exact_on_a_line():
    series = np.outer(np.arange(12.0), [1.0, -2.0]) + np.array([3.0, 5.0])
    cached = one("taocache", measured(series, "output"), interval=4)
    assert digits(cached.mask) == "111100010001"
    assert cached.predictor.coefficients(5, [3, 2]) == pytest.approx([3, -2])
    assert cached.predictor.coefficients(8, [7, 3]) == pytest.approx([1.25, -0.25])


# OmniCache


def test_omnicache_computes_where_the_trajectory_bends():
    """A path that is straight but for its last third, where it turns."""
    angle = np.concatenate([np.zeros(16), np.arange(1, 9) * 0.7])
    series = np.cumsum(np.stack([np.cos(angle), np.sin(angle)], 1), 0) + 20
    setting = measured(series, "output")
    mask = one("omnicache", setting, interval=3).mask
    assert mask[0] == 1 and sum(mask) <= 8
    assert sum(mask[16:]) / 8 > 1.5 * sum(mask[:16]) / 16
    gaps = np.diff([step for step, full in enumerate(mask) if full])
    assert gaps.max() <= 6  # twice the interval


def test_omnicache_spaces_evenly_where_nothing_bends():
    mask = one("omnicache", measured(np.zeros((12, 2)), "output"), interval=3).mask
    assert digits(mask) == "100100100100"


# in common


@pytest.mark.parametrize(
    ("policy", "neutral", "site"),
    [
        ("ertacache", {"threshold": 0.0}, "delta"),
        ("taocache", {"interval": 1}, "output"),
        ("omnicache", {"interval": 1}, "output"),
    ],
)
def test_neutral_settings_compute_every_step(policy, neutral, site):
    series = np.random.default_rng(1).standard_normal((9, 5))
    assert set(one(policy, measured(series, site), **neutral).mask) == {1}


@pytest.mark.parametrize("policy", ["magcache", "ertacache", "taocache", "omnicache"])
def test_all_streams_of_the_profile_count(policy):
    """Two equal streams decide what one does."""
    site = {"ertacache": "delta", "magcache": "stack"}.get(policy, "output")
    series = 5 + np.random.default_rng(2).standard_normal((14, 3)).cumsum(0)
    parameters = {"site": "stack"} if policy == "magcache" else {}
    alone, both = (one(policy, measured(series, site, streams), **parameters) for streams in (1, 2))
    assert alone == both


@pytest.mark.parametrize("policy", ["magcache", "ertacache", "taocache", "omnicache"])
def test_what_needs_a_profile_says_so(policy):
    assert "profile" in POLICIES[policy].needs
    assert POLICIES[policy].syncs == "0"
    parameters = {"site": "stack"} if policy == "magcache" else {}
    with pytest.raises(PolicyError, match="needs a calibration profile"):
        one(policy, Setting(range(9), {"delta": None}), **parameters)


# real runs


@pytest.fixture(scope="module", params=["mmdit", "unet"])
def run(request):
    return demo_run(request.param)


RUNS = {  # parameters; on each pipeline the full steps, and the PSNR measured less 2 dB
    "magcache": ({"threshold": 0.2, "max_skip": 2}, {"mmdit": (6, 36), "unet": (6, 32.3)}),
    "ertacache": ({"threshold": 0.15}, {"mmdit": (6, 41.4), "unet": (9, 47.1)}),
    "taocache": ({"interval": 2}, {"mmdit": (8, 57.8), "unet": (8, 45)}),
    "omnicache": ({"interval": 2}, {"mmdit": (6, 39.3), "unet": (6, 30)}),
}


@pytest.mark.parametrize("policy", RUNS)
def test_images_stay_near(run, policy):
    parameters, floors = RUNS[policy]
    images, net = run(policy, **parameters)
    counts = net.sessions.counts
    assert counts.computed == sum(net.plan.steps_mask)
    assert (counts.forecast, counts.missed) == (STEPS - counts.computed, 0)
    full, floor = floors[run.name]
    assert counts.computed <= full
    assert run.psnr(images) > floor


def test_threshold_zero_is_the_original_bit_for_bit(run):
    images, net = run("magcache", threshold=0)
    assert torch.equal(images, run.expected)
    assert net.sessions.counts.forecast == 0


@pytest.fixture(scope="module")
def calibrated():
    """The ratios that diffusers' own calibration run prints for two prompts."""
    pipe, printed = dcc.demo.load("mmdit"), io.StringIO()
    pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=STEPS, calibrate=True))
    with contextlib.redirect_stdout(printed):
        PipelineTarget(pipe, demo_run("mmdit").call).generate(CALIBRATION, SEEDS)
    return ast.literal_eval(next(line for line in printed.getvalue().splitlines() if line.startswith("[1.0")))


def test_magcache_draws_what_the_hook_of_diffusers_draws(calibrated):
    """With the library's own ratios: the same steps computed, the same images, while caching changes them far more."""
    run, pipe = demo_run("mmdit"), dcc.demo.load("mmdit")
    settings = {"threshold": 0.2, "max_skip": 2, "retention_ratio": 0.2}
    decisions, step = [], [-1]
    settings_of_hook = {"max_skip_steps" if name == "max_skip" else name: value for name, value in settings.items()}
    pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=STEPS, mag_ratios=calibrated, **settings_of_hook))
    pipe.transformer.register_forward_pre_hook(lambda *args: step.__setitem__(0, step[0] + 1))
    inner = pipe.transformer.transformer_blocks[1].attn
    inner.register_forward_pre_hook(lambda *args: decisions.append(step[0]))
    theirs = PipelineTarget(pipe, run.call).generate(PROMPTS, SEEDS).images

    ours, net = run("magcache", ratios=calibrated, **settings)
    assert [s for s, full in enumerate(net.plan.steps_mask) if full] == decisions
    assert 0 < len(decisions) < STEPS
    assert (theirs - run.expected).abs().max() > 0.01
    assert (ours - theirs).abs().max() < 2e-5


def test_norms_of_the_profile_give_the_ratios_that_diffusers_calibrates(calibrated):
    """Root mean squares of whole values here, means over tokens there; two prompts each."""
    own = np.sqrt(np.diag(gram_of(demo_run("mmdit").setting, "stack")))
    assert own[1:] / own[:-1] == pytest.approx(calibrated[1:], rel=0.003)
