"""Layer-adaptive schedules: masks by hand, learned masks, what is refused, and real runs of both demo pipelines."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dcc.discover.sites import Sites, find_sites
from dcc.errors import PolicyError, ProfileError
from dcc.policies import Setting, make_policy
from dcc.policies.layer_adaptive import placed

from .demo_runs import STEPS, demo_run
from .test_profile import synthetic

pytestmark = pytest.mark.usefixtures("graphs")

BRANCHES = ("blocks.0/attn", "blocks.0/mlp", "blocks.1/attn", "blocks.1/mlp")


def digits(values):
    return "".join(map(str, values))


def masks(policy):
    return {cached.site: digits(cached.mask) for cached in policy.caches}


@pytest.fixture(scope="module")
def setting(transformer):
    """setting(steps, **measured) of a denoiser of two blocks, each attention and an MLP."""
    sites = find_sites(transformer.captured, transformer.call)

    def make(steps=8, **measured):
        return Setting(range(steps), sites, **measured)

    return make


def profile_of(values):
    """A profile of features by site: [S] numbers or [S, n]."""
    features = torch.stack([torch.tensor(v, dtype=torch.float64).reshape(len(v), -1) for v in values.values()])[None]
    return lambda: synthetic(features, sites=list(values), default=next(iter(values)))


# Block Caching


def test_block_caching_adds_changes_up_until_they_exceed_delta(setting):
    """0.1 per step exceeds 0.25 at every third; a jump of 1 does at once, and what came before it no longer counts."""
    steady, jump = [1.1**s for s in range(8)], [1, 1.1, 2.2, 2.2, 2.2 * 1.2, 2.2 * 1.2, 2.2 * 1.2 * 1.1, 2.2]
    profile = profile_of({"blocks.0": steady, "blocks.1": jump})
    policy = make_policy("block_caching", setting(profile=profile), {"delta": 0.25})
    assert masks(policy) == {"blocks.0": "10010010", "blocks.1": "10100010"}
    wide = make_policy("block_caching", setting(profile=profile), {"delta": 2.0})
    assert masks(wide) == {"blocks.0": "10000000", "blocks.1": "10000000"}


# BAC


def test_updates_are_placed_where_they_cost_least():
    generator = np.random.default_rng(0)
    for steps, updates in itertools.product((1, 2, 5, 7), (1, 2, 3, 9)):
        distance = generator.random((steps, steps))
        mask = placed(distance, updates)
        assert mask[0] == 1 and sum(mask) == min(updates, steps)

        def cost(mask, distance=distance):
            last = [max(s for s in range(step + 1) if mask[s]) for step in range(len(mask))]
            return sum(distance[anchor, step] for step, anchor in enumerate(last))

        others = [(1, *rest) for rest in itertools.product((0, 1), repeat=steps - 1)]
        assert cost(mask) == pytest.approx(min(cost(other) for other in others if sum(other) == sum(mask)))


def turning(at, size):
    """A value that points one way before a step and another from there on: [8, 2]."""
    return [[size, 0.0] if s < at else [0.0, size] for s in range(8)]


def bac(setting, sizes=(1, 1, 1, 1), **parameters):
    values = {name: turning(at, size) for name, at, size in zip(BRANCHES, (3, 2, 6, 5), sizes, strict=True)}
    return masks(make_policy("bac", setting(profile=profile_of(values)), {"interval": 4, **parameters}))


def test_bac_updates_each_branch_where_it_turns(setting):
    assert list(bac(setting, bu_blocks=0).values()) == ["10010000", "10100000", "10000010", "10000100"]


def test_bubbling_union_updates_the_mlps_of_most_change_with_those_after_them(setting):
    union = {"blocks.0/mlp": "10100100", "blocks.1/mlp": "10000100"}
    assert union.items() <= bac(setting, sizes=(1, 2, 9, 1), bu_blocks=1).items()
    assert union.items() <= bac(setting, bu_blocks=3).items()
    alone = {"blocks.0/mlp": "10100000", "blocks.1/mlp": "10000100"}
    assert alone.items() <= bac(setting, sizes=(1, 1, 9, 2), bu_blocks=1).items()
    assert bac(setting, bu_blocks=3)["blocks.0/attn"] == "10010000"


def test_bac_takes_the_cosine_not_the_distance(setting):
    """Values that only grow point the same way: any copy is as good, whatever its size."""
    values = {name: [[2.0**s, 0.0] for s in range(5)] + [[0.0, 1.0]] * 3 for name in BRANCHES}
    policy = make_policy("bac", setting(profile=profile_of(values)), {"interval": 4, "bu_blocks": 0})
    assert set(masks(policy).values()) == {"10000100"}


# FEB-Cache


def test_feb_cache_reuses_attention_longer_than_mlps(setting):
    assert masks(make_policy("feb_cache", setting(7), {})) == {"self": "1001001", "mlp": "1011011"}
    given = make_policy("feb_cache", setting(5), {"table": [0, 1, 2, 2, 0]})
    assert masks(given) == {"self": "10001", "mlp": "11001"}


def test_feb_cache_where_one_projection_joins_attention_and_mlp():
    sites = demo_run("mmdit").sites
    policy = make_policy("feb_cache", Setting(range(4), sites), {})
    assert masks(policy) == {"self": "1001", "heads": "1001", "mlp": "1011", "joint": "1011"}
    innermost = [site.name for site in sites.select("innermost")]
    assert not any(name.endswith("/heads") for name in innermost)  # asked for just now, and no branches


# learned masks

ROUTERS = [[0.9, 0.9, 0.9, 0.9], [0.0, 0.05, 0.1, 0.2], [0.3, 0.0, 0.5, 1.0]]


@pytest.mark.parametrize("name", ["l2c", "harmonica"])
def test_routers_above_the_threshold_reuse(setting, name):
    expected = dict(zip(BRANCHES, ("110", "111", "110", "100"), strict=True))
    assert masks(make_policy(name, setting(3), {"mask": ROUTERS})) == expected
    bolder = make_policy(name, setting(3), {"mask": ROUTERS, "threshold": 0.4})
    assert digits(bolder.caches[0].mask) == "111"


def test_lazy_gates_compute_from_the_threshold_on(setting):
    expected = dict(zip(BRANCHES, ("100", "100", "101", "101"), strict=True))
    assert masks(make_policy("lazydit", setting(3), {"mask": ROUTERS})) == expected


def test_masks_come_from_files(setting, tmp_path):
    expected = make_policy("l2c", setting(3), {"mask": ROUTERS, "threshold": 0.15})
    (tmp_path / "mask.json").write_text(json.dumps(ROUTERS))
    save_file({"router": torch.tensor(ROUTERS)}, tmp_path / "mask.safetensors")
    for name in ("mask.json", "mask.safetensors"):
        assert make_policy("l2c", setting(3), {"mask": str(tmp_path / name), "threshold": 0.15}) == expected


def test_files_that_hold_no_mask_are_refused(setting, tmp_path):
    (tmp_path / "no.json").write_text("{")
    (tmp_path / "no.safetensors").write_bytes(b"no header")
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(3, 4)}, tmp_path / "two.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "flat.safetensors")
    for name, message in [
        ("no.json", "no.json': cannot be read as one JSON table"),
        ("gone.json", "gone.json': cannot be read as one JSON table"),
        ("no.safetensors", "no.safetensors': cannot be read as one safetensors table"),
        ("gone.safetensors", "gone.safetensors': cannot be read as one safetensors table"),
        ("two.safetensors", "two.safetensors': cannot be read as one safetensors table: too many values"),
        ("flat.safetensors", "mask must be a list of rows"),
    ]:
        with pytest.raises(PolicyError, match=message):
            make_policy("l2c", setting(3), {"mask": str(tmp_path / name)})


# ProfilingDiT


def test_profiling_dit_caches_runs_of_background_blocks():
    mmdit = Setting(range(10), demo_run("mmdit").sites)
    given = {"background": [0, 1, 4, 6, 5], "first": 2, "interval": 3}
    assert masks(make_policy("profiling_dit", mmdit, given)) == dict.fromkeys(
        ("blocks[0:2]", "blocks[4:7]"), "1100100100"
    )
    listed = make_policy("profiling_dit", mmdit, {"background": [7], "first": 1, "refresh": [4, 9]})
    assert masks(listed) == {"blocks[7:8]": "1000100001"}


def test_profiling_dit_takes_the_blocks_that_change_least(setting):
    profile = profile_of({"blocks.0": [1.5**s for s in range(8)], "blocks.1": [1.1**s for s in range(8)]})
    policy = make_policy("profiling_dit", setting(profile=profile), {"first": 1, "interval": 4})
    assert masks(policy) == {"blocks[1:2]": "10001000"}


# what all of them share

ONES = [[1] * 4] * 8


@pytest.mark.parametrize(
    ("name", "neutral"),
    [
        ("block_caching", {"delta": 0}),
        ("bac", {"interval": 1}),
        ("feb_cache", {"interval": 1}),
        ("l2c", {"mask": ONES, "threshold": 1}),
        ("harmonica", {"mask": ONES, "threshold": 1}),
        ("lazydit", {"mask": ONES}),
        ("profiling_dit", {"interval": 1}),
    ],
)
def test_neutral_settings_compute_everything(setting, name, neutral):
    moving = {name: [1.1**s for s in range(8)] for name in ("blocks.0", "blocks.1", *BRANCHES)}
    policy = make_policy(name, setting(profile=profile_of(moving)), neutral)
    assert set(masks(policy).values()) == {"1" * 8}


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("block_caching", {"delta": -1}, "delta=-1 must be"),
        ("block_caching", {"delta": math.nan}, "delta=nan must be"),
        ("block_caching", {}, "needs a calibration profile, which is not at hand"),
        ("bac", {"interval": 0}, "interval=0 must be"),
        ("bac", {"bu_blocks": -1}, "bu_blocks=-1 must be"),
        ("feb_cache", {"interval": 2.5}, "interval=2.5 must be"),
        ("feb_cache", {"table": [0, 1]}, "table must be 8 numbers 0, 1 or 2"),
        ("feb_cache", {"table": [1] * 8}, "the first of them 0"),
        ("feb_cache", {"table": 3}, "table=3 must be of type list"),
        ("l2c", {"mask": ROUTERS}, r"mask must be 8 steps of 4.*\(blocks.0/attn ... blocks.1/mlp\); got 3 rows"),
        ("harmonica", {"mask": [[0.5] * 3] * 8}, r"mask must be 8 steps of 4 numbers.*got 8 rows of \[3\]"),
        ("lazydit", {"mask": [["a"] * 4] * 8}, "mask=list .* must be of type list"),
        ("lazydit", {"mask": [[[1]] * 4] * 8}, "mask=list .* must be of type list"),
        ("lazydit", {"mask": 7}, "mask=7 must be of type list"),
        ("profiling_dit", {"background": [2]}, r"background=\[2\]: name one block or more, from 0 to 1"),
        ("profiling_dit", {"background": []}, r"background=\[\]: name one block or more"),
        ("profiling_dit", {"background": [0], "refresh": [8]}, r"\[8\] are no steps of a run of 8"),
        ("profiling_dit", {"share": 2}, "share=2 must be"),
    ],
)
def test_refusals(setting, name, parameters, message):
    with pytest.raises(PolicyError, match=message):
        make_policy(name, setting(), parameters)


def test_a_profile_without_the_site_is_refused_by_name(setting):
    measured = setting(profile=profile_of({"blocks.0": [1.0] * 8}))
    with pytest.raises(ProfileError, match=r"blocks\.1"):
        make_policy("block_caching", measured, {})
    with pytest.raises(ProfileError, match=r"blocks\.0/attn"):
        make_policy("bac", measured, {})


def test_a_denoiser_without_branches_is_refused(transformer):
    nothing = Setting(range(8), Sites(transformer.captured, transformer.call))
    with pytest.raises(PolicyError, match="feb_cache needs branches on a residual stream; this denoiser shows none"):
        make_policy("feb_cache", nothing, {})
    with pytest.raises(PolicyError, match="needs 2 or more repeated blocks; the denoiser has 0"):
        make_policy("profiling_dit", nothing, {})


# real runs: PSNR of copies of step 0 alone is 25 to 27 dB (mmdit) and 18 to 23 dB (unet)


def table(pipeline, interval):
    """A mask of 1 at every `interval`-th step, for all innermost branches."""
    width = len(demo_run(pipeline).sites.select("innermost"))
    return [[float(s % interval == 0)] * width for s in range(STEPS)]


@pytest.mark.parametrize(
    ("pipeline", "name", "parameters", "psnr", "speedup"),
    [
        ("mmdit", "block_caching", {"delta": 0.1}, 37, 1.1),
        ("mmdit", "bac", {"interval": 2}, 36, 1.65),
        ("mmdit", "feb_cache", {}, 36, 1.75),
        ("mmdit", "l2c", {}, 39.5, 1.95),
        ("mmdit", "lazydit", {}, 39.5, 1.95),
        ("mmdit", "profiling_dit", {"first": 2, "interval": 3}, 34, 1.3),
        ("unet", "block_caching", {"delta": 0.1}, 45, 1.05),
        ("unet", "bac", {"interval": 2}, 27, 1.15),
        ("unet", "feb_cache", {}, 34, 1.1),
        ("unet", "harmonica", {}, 38, 1.2),
        ("unet", "profiling_dit", {"first": 2, "interval": 3}, 33, 1.5),
    ],
)
def test_images_stay_near_and_work_is_saved(pipeline, name, parameters, psnr, speedup):
    run = demo_run(pipeline)
    if name in ("l2c", "harmonica"):
        parameters = {"mask": [[1 - value for value in row] for row in table(pipeline, 2)]}
    elif name == "lazydit":
        parameters = {"mask": table(pipeline, 2)}
    images, net = run(name, **parameters)
    counts, plan = net.sessions.counts, net.plan
    assert counts.forecast == STEPS - sum(plan.steps_mask) > 0 and counts.missed == 0
    assert plan.speedup > speedup
    assert run.psnr(images) > psnr


@pytest.mark.parametrize(("pipeline", "name"), [("mmdit", "bac"), ("unet", "feb_cache")])
def test_neutral_settings_are_the_original(pipeline, name):
    run = demo_run(pipeline)
    images, net = run(name, interval=1)
    assert torch.equal(images, run.expected)
    assert net.plan.cache_bytes == 0
