"""Static policies: masks by hand, what they refuse, and real runs of both demo pipelines."""

import pytest
import torch

from dcc.discover.sites import Sites, find_sites
from dcc.errors import PolicyError, SiteError
from dcc.policies import Setting, make_policy
from dcc.policies.static import around

from .demo_runs import STEPS, demo_run
from .test_profile import synthetic

pytestmark = pytest.mark.usefixtures("graphs")

TENTHS = tuple(100.0 * s for s in range(9, -1, -1))  # timesteps of ten steps, 900 to 0
WIDE = (-1, 1001)


def digits(values):
    return "".join(map(str, values))


def masks(policy):
    return {cached.site: digits(cached.mask) for cached in policy.caches}


@pytest.fixture(scope="module")
def setting(transformer):
    """setting(levels, **measured) of a denoiser of two blocks, each attention and an MLP."""
    sites = find_sites(transformer.captured, transformer.call)

    def make(levels=range(8), **measured):
        return Setting(levels, sites, **measured)

    return make


def unet(levels=range(12)):
    return Setting(levels, demo_run("unet").sites)


def mmdit(levels=range(12)):
    return Setting(levels, demo_run("mmdit").sites)


def profile_of(values):
    """A profile of scalar features by site."""
    features = torch.tensor([list(v) for v in values.values()], dtype=torch.float64)[None, :, :, None]
    return lambda: synthetic(features, sites=list(values), default=next(iter(values)))


# DeepCache


def test_deepcache_caches_below_a_skip():
    assert masks(make_policy("deepcache", unet(), {})) == {"cut:0": "100100100100"}
    assert masks(make_policy("deepcache", unet(), {"interval": 5, "branch": 2})) == {"cut:2": "100001000010"}


@pytest.mark.parametrize(
    ("steps", "count", "center", "power", "expected"),
    [
        (50, 10, 15, 1.4, [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]),
        (50, 10, 15, 1.2, [0, 5, 10, 14, 18, 22, 27, 32, 38, 44]),
        (50, 10, 10, 1.6, [0, 4, 7, 10, 14, 18, 24, 29, 36, 42]),
        (12, 4, 4, 1.2, [0, 3, 5, 8]),
    ],
)
def test_deepcache_spreads_unevenly_as_released(steps, count, center, power, expected):
    """Expected numbers: the released function, run."""
    assert around(steps, count, center, power) == expected


def test_deepcache_spreads_as_many_steps_as_the_interval_has():
    uneven = masks(make_policy("deepcache", unet(), {"center": 4}))["cut:0"]
    assert uneven == "100101001000"
    assert uneven.count("1") == masks(make_policy("deepcache", unet(), {}))["cut:0"].count("1")


def test_a_spread_without_room_is_refused():
    with pytest.raises(PolicyError, match="no 15 different steps of 20 are denser around center=3; give a larger"):
        around(20, 15, 3, 1.4)


# FasterDiffusion


def test_faster_diffusion_at_the_published_key_steps():
    mask = masks(make_policy("faster_diffusion", unet(range(50)), {}))["encoder"]
    assert [s for s, full in enumerate(mask) if full == "1"] == [0, 1, 2, 3, 5, 10, 15, 25, 35]


def test_faster_diffusion_at_other_step_counts_and_key_steps():
    assert masks(make_policy("faster_diffusion", unet(range(20)), {})) == {"encoder": "11101010001000100000"}
    given = make_policy("faster_diffusion", unet(range(6)), {"key_steps": [2, 4]})
    assert masks(given) == {"encoder": "101010"}


def test_the_encoder_is_all_that_the_decoder_takes():
    """Skips of the demo U-Net: its first convolution, two of each of three levels, two downsamplers; and the middle."""
    sites = demo_run("unet").sites
    encoder, cuts = sites["encoder"], [site for site in sites if site.name.startswith("cut:")]
    assert len(cuts) == 9 and len(encoder.ports) == 9 + 1
    assert sites.share(encoder) < sites.share(sites["cut:0"])


# branches


def test_fora_and_frdiff(setting):
    assert masks(make_policy("fora", setting(), {})) == {"branches": "10010010"}
    assert masks(make_policy("frdiff", setting(), {})) == {"branches": "10101010"}


def test_delta_dit_caches_rear_blocks_early_and_front_blocks_late(setting):
    policy = make_policy("delta_dit", setting(), {})
    assert masks(policy) == {"blocks[1:2]": "10101111", "blocks[0:1]": "11111010"}
    policy = make_policy("delta_dit", mmdit(range(9)), {"interval": 3, "share": 0.75, "boundary": 0.34})
    assert masks(policy) == {"blocks[2:8]": "100111111", "blocks[0:6]": "111100100"}


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_pab_broadcasts_each_kind_at_its_own_pace(scale):
    levels = [t * scale for t in TENTHS]  # 700 to 200 are inside the window
    attention, cross = "1110101011", "1100001011"
    assert masks(make_policy("pab", unet(levels), {})) == {"self": attention, "cross": cross}
    with_mlps = make_policy("pab", unet(levels), {"attention": 3, "cross": 4, "mlp": 2})
    assert masks(with_mlps) == {"self": "1101001011", "cross": "1100100011", "mlp": attention}
    assert masks(make_policy("pab", mmdit(levels), {})) == {"self": attention, "heads": attention}


# SmoothCache

RISING = (1, 1.1, 1.2, 1.3, 2, 2.1, 2.2, 4)
STILL = (1,) * 8


def test_smoothcache_takes_the_longest_look_ahead_within_the_bound(setting):
    """From 1.0 the third look-ahead is 0.3 / 1.3 away, from 1.3 the first 0.7 / 2; the last step computes."""
    bumpy = (1, 2, 1, 1, 1, 1, 1, 1)  # the first look-ahead fails, the third does not
    values = {"blocks.0/attn": RISING, "blocks.1/attn": RISING, "blocks.0/mlp": bumpy, "blocks.1/mlp": bumpy}
    policy = make_policy("smoothcache", setting(profile=profile_of(values)), {})
    assert masks(policy) == {"self": "10011001", "mlp": "10001001"}


def test_smoothcache_averages_over_blocks(setting):
    values = {"blocks.0/attn": RISING, "blocks.1/attn": STILL, "blocks.0/mlp": STILL, "blocks.1/mlp": STILL}
    policy = make_policy("smoothcache", setting(profile=profile_of(values)), {"lookahead": 2})
    assert masks(policy) == {"self": "10010101", "mlp": "10010011"}
    policy = make_policy("smoothcache", setting(profile=profile_of(values)), {"lookahead": 7, "alpha": 0.16})
    assert masks(policy) == {"self": "10001001", "mlp": "10000001"}


# prefixes and ranges


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, "11111101010101010101"),  # steps 5 to 18 are inside the window
        ({"interval": 3}, "11111100100100100101"),
        ({"window": (0.0, 1.0), "interval": 4}, "10001000100010001000"),
    ],
)
def test_blockdance_skips_the_first_blocks_late_in_the_run(setting, parameters, expected):
    assert masks(make_policy("blockdance", setting(range(20)), parameters)) == {"after:0": expected}


@pytest.mark.parametrize(("depth", "block"), [(0.7, 5), (0.5, 3), (0.0, 0), (1.0, 6)])
def test_blockdance_leaves_one_block_at_least(depth, block):
    assert set(masks(make_policy("blockdance", mmdit(), {"depth": depth}))) == {f"after:{block}"}


def test_the_value_behind_a_block_saves_all_blocks_before_it():
    """The residual of the same blocks leaves what it adds to: the value needs the embedding of the sample no more."""
    sites = demo_run("mmdit").sites
    after, residual = sites["after:5"], sites["blocks[0:6]"]
    assert [port.out for port in after.ports] == [port.out for port in residual.ports]
    assert {port.base for port in after.ports} == {None} and None not in {port.base for port in residual.ports}
    assert after.flops > residual.flops


def test_skip_dit_computes_the_first_and_the_last_block():
    assert masks(make_policy("skip_dit", mmdit(TENTHS), {})) == {"blocks[1:7]": "1110101011"}
    levels = [t / 1000 for t in TENTHS]
    assert masks(make_policy("skip_dit", mmdit(levels), {"interval": 4})) == {"blocks[1:7]": "1110100011"}


# ECAD


def judge(weights, calls):
    """A score: how much of what the policy computes has weight."""

    def score(policy):
        calls.append(policy)
        return float((torch.tensor([cached.mask for cached in policy.caches]).T * weights).sum())

    return score


def test_ecad_searches_masks_of_one_cost(setting):
    weights, calls = torch.rand(8, 4), []
    found = make_policy("ecad", setting(score=judge(weights, calls)), {"population": 6, "generations": 9})
    assert len(calls) == 6 + 9 * 3
    assert {sum(sum(cached.mask) for cached in policy.caches) for policy in calls} == {8 * 4 // 2}
    assert all(cached.mask[0] == 1 for policy in calls for cached in policy.caches)
    score = judge(weights, [])
    assert score(found) == max(map(score, calls)) > max(map(score, calls[:6]))
    assert digits(calls[0].caches[0].mask) == "10101010"


def test_ecad_repeats_itself(setting):
    def run(seed):
        return make_policy("ecad", setting(score=judge(torch.ones(8, 4).tril(), [])), {"seed": seed})

    assert run(1) == run(1) != run(2)


def test_ecad_takes_a_mask_that_was_found_before(setting):
    table = [[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0]]
    policy = make_policy("ecad", setting(range(3)), {"mask": table})
    assert masks(policy) == {
        "blocks.0/attn": "101",
        "blocks.0/mlp": "110",
        "blocks.1/attn": "100",
        "blocks.1/mlp": "110",
    }


# what all of them share


@pytest.mark.parametrize(
    ("name", "neutral"),
    [
        ("fora", {"interval": 1}),
        ("frdiff", {"interval": 1}),
        ("delta_dit", {"interval": 1}),
        ("pab", {"attention": 1, "cross": 1, "mlp": 1, "window": WIDE}),
        ("smoothcache", {"alpha": 0}),
        ("blockdance", {"interval": 1, "window": (0, 1)}),
        ("ecad", {"speedup": 1}),
    ],
)
def test_neutral_settings_compute_everything(setting, name, neutral):
    sites = ("blocks.0/attn", "blocks.1/attn", "blocks.0/mlp", "blocks.1/mlp")
    policy = make_policy(name, setting(profile=profile_of(dict.fromkeys(sites, RISING)), score=lambda p: 1.0), neutral)
    assert set(masks(policy).values()) == {"1" * 8}


@pytest.mark.parametrize(
    ("make", "name", "neutral"),
    [
        (mmdit, "skip_dit", {"interval": 1, "window": WIDE}),
        (unet, "deepcache", {"interval": 1}),
        (unet, "deepcache", {"interval": 1, "center": 4}),
        (unet, "faster_diffusion", {"key_steps": range(12)}),
    ],
)
def test_neutral_settings_of_the_others(make, name, neutral):
    assert set(masks(make_policy(name, make(), neutral)).values()) == {"1" * 12}


@pytest.mark.parametrize(
    ("make", "name", "parameters", "message"),
    [
        (unet, "deepcache", {"interval": 0}, "interval=0 must be"),
        (unet, "deepcache", {"branch": -1}, "branch=-1 must be"),
        (unet, "deepcache", {"branch": 12}, "skip connection 12; this one has others, e.g. cut:0"),
        (unet, "deepcache", {"center": 0}, "center=0 must be a number from 1 to 11"),
        (unet, "deepcache", {"center": 3, "power": 0.5}, "power=0.5 must be a number from 1 to 5"),
        (unet, "faster_diffusion", {"key_steps": [3, 12]}, r"\[12\] are no steps of a run of 12"),
        (mmdit, "fora", {"interval": 1.5}, "interval=1.5 must be"),
        (mmdit, "delta_dit", {"share": 1.1}, "share=1.1 must be"),
        (mmdit, "delta_dit", {"boundary": -1}, "boundary=-1 must be"),
        (mmdit, "pab", {"attention": 0}, "attention=0 must be"),
        (mmdit, "pab", {"window": (800, 100)}, "window=100 must be a number from 800 to inf"),
        (mmdit, "pab", {"window": 800}, "window=800 must be of type list"),
        (mmdit, "smoothcache", {"alpha": -0.1}, "alpha=-0.1 must be"),
        (mmdit, "smoothcache", {"lookahead": 0}, "lookahead=0 must be"),
        (mmdit, "smoothcache", {}, "needs a calibration profile, which is not at hand"),
        (mmdit, "blockdance", {"depth": 2}, "depth=2 must be"),
        (mmdit, "blockdance", {"window": "ab"}, "window='ab' must be of type list"),
        (mmdit, "skip_dit", {"window": (1, 2, 3)}, r"window=\(1, 2, 3\) must be two numbers"),
        (mmdit, "ecad", {"speedup": 0.5}, "speedup=0.5 must be"),
        (mmdit, "ecad", {"population": 1}, "population=1 must be"),
        (mmdit, "ecad", {"mask": [[1] * 4] * 12}, r"mask must be 12 steps of 17 numbers 0 or 1.*rows of \[4\]"),
        (mmdit, "ecad", {"mask": [[0] * 17] * 12}, "mask must begin with a row of ones"),
        (mmdit, "ecad", {}, "needs runs of the calibration prompts, which is not at hand"),
        (mmdit, "deepcache", {}, "deepcache needs a U-Net with a skip connection 0; this denoiser has none"),
        (mmdit, "faster_diffusion", {}, "faster_diffusion needs a U-Net with skip connections"),
        (unet, "delta_dit", {}, r"residual stream; blocks\[4:8\] does not end on its own"),
        (unet, "blockdance", {}, "blockdance skips the first blocks, whose values this denoiser's skip connections"),
    ],
)
def test_refusals(make, name, parameters, message):
    with pytest.raises(PolicyError, match=message):
        make_policy(name, make(), parameters)


def test_few_blocks_are_refused(setting):
    with pytest.raises(PolicyError, match="needs 3 or more repeated blocks; the denoiser has 2"):
        make_policy("skip_dit", setting(), {})


def test_denoisers_without_branches_are_refused(transformer, stack):
    nothing = Setting(range(8), Sites(transformer.captured, transformer.call))
    with pytest.raises(PolicyError, match="smoothcache needs branches on a residual stream; this denoiser shows none"):
        make_policy("smoothcache", nothing, {})
    for name in ("fora", "frdiff"):
        with pytest.raises(SiteError, match="no sites in the group 'branches'"):
            nothing.sites.select(make_policy(name, nothing, {}).caches[0].site)
    mlps_alone = Setting(range(8), find_sites(stack.captured, stack.call))
    with pytest.raises(PolicyError, match="pab needs attention branches on a residual stream"):
        make_policy("pab", mlps_alone, {})
    assert set(masks(make_policy("pab", mlps_alone, {"mlp": 2, "window": WIDE}))) == {"mlp"}


# real runs: PSNR of copies of step 0 alone is 25 to 27 dB (mmdit) and 18 to 23 dB (unet)

ALTERNATE = [[1 - s % 2] * 17 for s in range(STEPS)]


@pytest.mark.parametrize(
    ("pipeline", "name", "parameters", "psnr", "speedup"),
    [
        ("mmdit", "fora", {}, 34, 2.9),
        ("mmdit", "frdiff", {}, 39.5, 1.95),
        ("mmdit", "delta_dit", {}, 39, 1.3),
        ("mmdit", "pab", {}, 43, 1.1),
        ("mmdit", "pab", {"attention": 3, "mlp": 3, "window": WIDE}, 33, 1.55),
        ("mmdit", "smoothcache", {}, 33, 1.5),
        ("mmdit", "blockdance", {}, 44, 1.3),
        ("mmdit", "skip_dit", {}, 43, 1.3),
        ("mmdit", "ecad", {"mask": ALTERNATE}, 39.5, 1.95),
        ("unet", "deepcache", {}, 30.5, 2.65),
        ("unet", "deepcache", {"branch": 2, "center": 4}, 28, 2.0),
        ("unet", "faster_diffusion", {}, 28, 1.15),
        ("unet", "fora", {}, 32, 1.4),
        ("unet", "frdiff", {}, 38, 1.25),
        ("unet", "pab", {}, 34.5, 1.04),
        ("unet", "smoothcache", {}, 34, 1.05),
        ("unet", "skip_dit", {}, 38.5, 1.3),
    ],
)
def test_images_stay_near_and_work_is_saved(pipeline, name, parameters, psnr, speedup):
    run = demo_run(pipeline)
    images, net = run(name, **parameters)
    counts, plan = net.sessions.counts, net.plan
    assert counts.forecast == STEPS - sum(plan.steps_mask) > 0 and counts.missed == 0
    assert counts.computed == sum(plan.steps_mask)
    assert plan.speedup > speedup
    assert run.psnr(images) > psnr


def test_ecad_searches_on_real_runs():
    run = demo_run("mmdit")
    images, net = run("ecad", population=2, generations=1)
    assert run.psnr(images) > 35
    assert net.plan.speedup == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("pipeline", "name", "neutral"),
    [
        ("mmdit", "fora", {"interval": 1}),
        ("mmdit", "delta_dit", {"interval": 1}),
        ("unet", "pab", {"attention": 1, "cross": 1}),
        ("unet", "faster_diffusion", {"key_steps": list(range(STEPS))}),
    ],
)
def test_neutral_settings_are_the_original(pipeline, name, neutral):
    run = demo_run(pipeline)
    images, net = run(name, **neutral)
    assert torch.equal(images, run.expected)
    assert net.plan.cache_bytes == 0
