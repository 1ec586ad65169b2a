"""T-GATE, FasterCache and DiTFastAttn: schedules by hand, published weights, real runs, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from dcc.errors import PolicyError, SiteError
from dcc.kernels.band_split import low_pass
from dcc.plans.predictors import Predictor
from dcc.policies import Cached, Policy, make_policy
from dcc.policies.setting import plan_for
from dcc.variants.guidance import weighed_bands

from .demo_runs import STEPS, demo_run

pytestmark = pytest.mark.usefixtures("graphs")


def masks(policy):
    """The mask of each site, as digits."""
    return {cached.site: "".join(map(str, cached.mask)) for cached in policy.caches}


def decide(name, pipeline="unet", **parameters):
    return make_policy(name, demo_run(pipeline).setting, parameters)


def test_t_gate_freezes_cross_attention_and_drops_guidance_after_the_gate():
    found = masks(decide("t_gate", gate_step=6, sp_interval=3, fi_interval=2))
    assert found == {"self": "111001" + "101010", "cross": "111111" + "000000", "uncond": "111111" + "000000"}
    assert decide("t_gate").caches[-1].predictor == Predictor("zero")
    assert masks(decide("t_gate"))["cross"] == "1" * round(0.4 * STEPS) + "0" * (STEPS - round(0.4 * STEPS))
    assert set(masks(decide("t_gate", drop_guidance=False))) == {"self", "cross"}


def test_fastercache_reuses_guidance_only_where_attention_is_forecast():
    found = masks(decide("fastercache", interval=2, start=0.25, guidance_interval=4))
    assert found["self"] == found["cross"] == "111" + "010101010"
    assert found["uncond"] == "111" + "010101010"
    found = masks(decide("fastercache", interval=4, start=0.25, guidance_interval=3))
    assert found["self"] == "111" + "000100010"
    assert found["uncond"] == "111" + "001101011"  # every third step, and those that compute attention
    assert decide("fastercache").caches[0].predictor == Predictor("extrapolate", 1, (("weight", 0.3),))


def test_fastercache_weights_compound_over_the_reuses_inside_their_window():
    grow = Predictor("growing", 0, (("rate", 1.1), ("since", 3.0), ("until", 6.0)))
    assert [grow.coefficients(step, [1])[0] for step in (2, 3, 4, 5, 6, 9)] == pytest.approx(
        [1, 1.1, 1.1**2, 1.1**3, 1.1**3, 1.1**3]
    )
    assert grow.coefficients(5, [4, 1]) == pytest.approx([1.1])  # anew from each anchor
    assert grow.coefficients(9, [7]) == [1.0]


def test_fastercache_windows_are_timesteps():
    sites, levels = demo_run("unet").sites, [950, 800, 500, 300, 200, 50]
    low, high = weighed_bands(sites, levels, (1.1, 1.2), ((99, 901), (-1, 301)))["bands"]["predictors"]
    assert low["options"] == {"rate": 1.1, "since": 1.0, "until": 5.0}
    assert high["options"] == {"rate": 1.2, "since": 3.0, "until": 6.0}
    scaled = weighed_bands(sites, [level / 1000 for level in levels], (1.1, 1.2), ((99, 901), (-1, 301)))
    assert scaled["bands"]["predictors"] == [low, high]
    never = weighed_bands(sites, levels, (1.1, 1.0), ((960, 999), (0, 1)))["bands"]["predictors"]
    assert Predictor.from_json(never[0]).coefficients(5, [0]) == [1.0]
    assert weighed_bands(sites, levels, (1.0, 1.0), ((99, 901), (-1, 301))) == {}


def test_fastercache_low_frequencies_are_those_of_the_released_transform():
    spec = decide("fastercache").caches[-1].form["bands"]
    height, width = demo_run("unet").sites["uncond"].shapes[0][-2:]
    assert (spec["transform"], spec["grid"]) == ("dct", None)
    assert spec["cutoff"] * math.hypot(height - 1, width - 1) == pytest.approx(2 * (min(height, width) // 5))
    points = torch.arange(width)

    def kept(waves):
        """Share of a wave across the picture that counts as low."""
        wave = torch.cos((2 * points + 1) * waves * math.pi / width).expand(1, 1, height, width)
        return float(low_pass(wave, "dct", spec["cutoff"]).norm() / wave.norm())

    radius = min(height, width) // 5  # diffusers keeps waves up to here: (x - center)^2 + (y - center)^2 <= radius^2
    assert kept(radius) == pytest.approx(1, abs=1e-4)
    assert kept(radius + 1) == pytest.approx(0, abs=1e-4)


def test_bands_of_one_weight_draw_what_the_whole_difference_times_it_draws():
    run = demo_run("unet")
    always = {"low_window": (-1, 1001), "high_window": (-1, 1001)}
    images, net = run("fastercache", low_weight=1.5, high_weight=1.5, **always)
    *attention, guidance = decide("fastercache", low_weight=1.5, high_weight=1.5, **always).caches
    assert max(len(zeros) for zeros in "".join(map(str, guidance.mask)).split("1")) == 1  # so no weight compounds
    whole = Cached("uncond", guidance.mask, Predictor("scaled", 0, (("scale", 1.5),)))
    policy = Policy((*attention, whole))
    plan = plan_for(policy, run.base.subject, "own", {})
    torch.testing.assert_close(images, run.images(run.base.with_plan(plan)), rtol=0, atol=1e-3)
    assert run.psnr(images) < run.psnr(run("fastercache")[0])  # half as much again is felt
    assert net.sessions.counts.missed == 0


def test_ditfastattn_shares_more_in_later_layers():
    found = decide("ditfastattn", delta=0.3)
    computed = [sum(cached.mask) for cached in found.caches]
    assert all(cached.mask[0] for cached in found.caches)
    assert STEPS > min(computed)
    assert [sum(cached.mask) for cached in decide("ditfastattn", delta=0.0).caches] == [STEPS] * len(computed)
    assert sum(computed) <= sum(sum(cached.mask) for cached in decide("ditfastattn", delta=0.1).caches)


# at 12 steps, a few dB under what was measured: 27.6, 30.4, 45.5, 46.2, 49.2 and 42.7 dB
FLOORS = [
    ("t_gate", {}, 25.0, 1.4),
    ("t_gate", {"drop_guidance": False}, 28.0, 1.03),
    ("fastercache", {}, 42.0, 1.15),
    ("fastercache", {"low_weight": 1.0, "high_weight": 1.0}, 43.0, 1.15),
    ("fastercache", {"guidance": False}, 46.0, 1.03),
    ("ditfastattn", {"delta": 0.2}, 40.0, 1.01),
]


@pytest.mark.parametrize(("name", "parameters", "decibels", "speedup"), FLOORS)
def test_images_stay_near_the_uncached_ones(name, parameters, decibels, speedup):
    run = demo_run("unet")
    images, net = run(name, **parameters)
    assert run.psnr(images) > decibels
    assert net.plan.speedup > speedup
    assert net.sessions.counts.missed == 0


def test_refuses_what_does_not_apply():
    with pytest.raises(PolicyError, match="t_gate needs cross-attention"):
        decide("t_gate", "mmdit")
    run = demo_run("mmdit")
    with pytest.raises(SiteError, match="merged guidance batch"):
        run.plan("fastercache", guidance=True)
    assert "uncond" not in run.plan("fastercache").sites
    for name, wrong in (
        ("fastercache", {"low_window": [901, 99]}),
        ("fastercache", {"high_window": 3}),
        ("fastercache", {"low_weight": -1.0}),
        ("fastercache", {"guidance_interval": 0}),
        ("t_gate", {"gate_step": 0}),
        ("ditfastattn", {"delta": -0.1}),
    ):
        with pytest.raises(PolicyError, match=next(iter(wrong))):
            decide(name, **wrong)
