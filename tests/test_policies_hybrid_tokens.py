"""ToCa, DuCa, ClusCa and RAS: masks and forms by hand, and real runs of the demo pipelines."""

import math

import pytest
import torch

import dcc
from dcc.discover.sites import Sites, find_sites
from dcc.errors import PlanError, PolicyError
from dcc.plans.plan import make_plan
from dcc.plans.predictors import Predictor
from dcc.policies import Setting, make_policy
from dcc.policies.hybrid import toca_interval, toca_mask
from dcc.variants.cost import cost

pytestmark = pytest.mark.usefixtures("graphs")

STEPS = 12
PROMPT = dcc.demo.prompts("test")[0]


def digits(values):
    return "".join(map(str, values))


@pytest.fixture(scope="module")
def setting(transformer):
    return Setting(range(STEPS), find_sites(transformer.captured, transformer.call))


def masks(policy):
    return {cached.site: digits(cached.mask) for cached in policy.caches}


def forms(policy):
    return {cached.site: cached.form["tokens"] for cached in policy.caches if cached.form}


def test_toca_interval_of_the_published_schedule():
    intervals = {left: toca_interval(3, left, 50) for left in range(50)}
    assert [intervals[left] for left in (0, 10, 20, 30, 40)] == [2, 2, 3, 3, 4]
    assert toca_interval(4, 0, 250) == 3 and toca_interval(4, 249, 250) == 7


@pytest.mark.parametrize(
    ("steps", "interval", "first", "sensitive", "expected"),
    [
        (12, 3, 1, (0.0, 0.0), "100001001010"),
        (12, 3, 1, (0.2, 0.4), "100001001010"),
        (12, 3, 3, (0.0, 0.0), "111000100101"),
        (12, 5, 1, (0.2, 0.4), "100000001010"),
        (12, 1, 1, (0.2, 0.4), "111111111111"),
    ],
)
def test_toca_mask(steps, interval, first, sensitive, expected):
    assert digits(toca_mask(Setting(range(steps)), interval, first, sensitive)) == expected


def test_toca(setting):
    policy = make_policy("toca", setting, {"interval": 3, "ratio": 0.1})
    assert masks(policy) == {
        "blocks.0/attn": "100001001010",
        "blocks.1/attn": "100001001010",
        "blocks.0/mlp": "122221221212",
        "blocks.1/mlp": "122221221212",
    }
    first, last = forms(policy).values()
    assert first == {"select": "norm", "sign": 1, "age": 0.25 / 3, "ratio": pytest.approx(0.1 * 2.5 * 1.8)}
    assert last["ratio"] == pytest.approx(0.1 * 2.5 * 0.2)


def test_toca_without_tokens_is_a_copy_of_every_branch(setting):
    policy = make_policy("toca", setting, {"ratio": 0})
    assert set(masks(policy).values()) == {"100001001010"}
    assert forms(policy) == {}


def test_toca_at_random(setting):
    policy = make_policy("toca", setting, {"select": "random"})
    assert {form["select"] for form in forms(policy).values()} == {"random"}
    assert make_policy("toca", setting, {"select": "small_norm"}).caches[-1].form["tokens"]["sign"] == -1
    with pytest.raises(PolicyError, match=r"select='magic'; there are: norm, small_norm, random"):
        make_policy("toca", setting, {"select": "magic"})


def test_duca_takes_conservative_and_aggressive_steps_in_turn(setting):
    policy = make_policy("duca", setting, {"interval": 5})
    assert masks(policy) == {
        "auto": "110101101011",
        "blocks.0/attn": "100001000010",
        "blocks.1/attn": "100001000010",
        "blocks.0/mlp": "120201202012",
        "blocks.1/mlp": "120201202012",
    }


def test_clusca(setting):
    policy = make_policy("clusca", setting, {"interval": 4, "first": 2, "clusters": 16})
    assert set(list(masks(policy).values())[:2]) == {"110001000100"}
    assert masks(policy)["blocks.1/mlp"] == "112221222122"
    assert {cached.predictor for cached in policy.caches} == {Predictor("taylor", 1)}
    assert forms(policy)["blocks.0/mlp"] == {"select": "cluster", "clusters": 6, "share": 0.005}  # of six tokens


def test_ras(setting):
    policy = make_policy("ras", setting, {"first": 3, "dense": (0.5,)})
    assert masks(policy) == dict.fromkeys(("blocks.0/mlp", "blocks.1/mlp", "output"), "111222122222")
    assert forms(policy)["output"] == {"select": "noise", "ratio": 0.5, "starvation": 0.1, "sign": 1}


@pytest.mark.parametrize(
    ("name", "neutral"), [("toca", {"interval": 1}), ("duca", {"interval": 1}), ("clusca", {"interval": 1}),
                          ("ras", {"ratio": 1})]
)  # fmt: skip
def test_neutral_settings_compute_everything(setting, name, neutral):
    assert set(masks(make_policy(name, setting, neutral)).values()) == {"1" * STEPS}


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("toca", {"ratio": 1.5}, "ratio=1.5 must be a number from 0 to 1"),
        ("toca", {"interval": 0}, "interval=0 must be"),
        ("toca", {"sensitive": (0.2, 3)}, "high=3 must be"),
        ("duca", {"ratio": -0.1}, "ratio=-0.1 must be"),
        ("duca", {"first": 0}, "first=0 must be"),
        ("clusca", {"clusters": 0}, "clusters=0 must be"),
        ("clusca", {"order": 9}, "order=9"),
        ("clusca", {"share": 2}, "share=2 must be"),
        ("ras", {"ratio": 0}, "ratio=0 must be"),
        ("ras", {"dense": (0.5, 7)}, r"dense\[1\]=7 must be"),
    ],
)
def test_bad_parameters(setting, name, parameters, message):
    with pytest.raises(PolicyError, match=message):
        make_policy(name, setting, parameters)


@pytest.mark.parametrize("name", ["toca", "duca", "clusca"])
def test_a_denoiser_without_mlps_is_refused(transformer, name):
    with pytest.raises(PolicyError, match="needs transformer blocks with an MLP branch"):
        make_policy(name, Setting(range(8), Sites(transformer.captured, transformer.call)), {})


@pytest.fixture(scope="module", params=["mmdit", "unet"])
def run(request):
    """run(policy, **parameters) -> its image and the compiled denoiser; run.expected is the uncached image."""
    name = request.param
    pipe = dcc.demo.load(name)
    pipe.set_progress_bar_config(disable=True)
    call = {**dcc.demo.settings(name), "num_inference_steps": STEPS}

    def image(steps=STEPS):
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPT, generator=generator, output_type="pt", **{**call, "num_inference_steps": steps}).images

    expected = image()

    def run(policy, watch=lambda net: None, steps=STEPS, **parameters):
        dcc.compile(pipe, [PROMPT], policy=policy, backend="eager", **parameters, **call)
        try:
            net = dcc.compiled(pipe)
            watch(net)
            first, again = image(steps), image(steps)
            assert torch.equal(first, again)  # no state of one generation reaches the next
            return first, net
        finally:
            dcc.restore(pipe)

    run.name, run.expected = name, expected
    return run


def psnr(image, expected):
    error = float((image.double() - expected.double()).pow(2).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


@pytest.mark.parametrize(
    ("policy", "parameters", "floors"),
    [
        ("toca", {}, (41, 38.5)),
        ("toca", {"select": "random", "ratio": 0.3}, (39.7, 38)),
        ("duca", {}, (37, 31.8)),
        ("duca", {"interval": 4, "first": 3, "ratio": 0.2}, (37.2, 35.3)),
        ("clusca", {"interval": 3}, (51, 36.7)),
        ("clusca", {"interval": 3, "order": 2, "share": 0.0}, (51, 35.7)),
    ],
)
def test_images_stay_near_and_work_is_saved(run, policy, parameters, floors):
    image, net = run(policy, **parameters)
    counts, plan = net.sessions.counts, net.plan
    assert counts.forecast == 2 * (STEPS - sum(plan.steps_mask)) > 0 and counts.missed == 0
    assert plan.speedup > 1.1
    assert psnr(image, run.expected) > floors[run.name == "unet"]
    assert 2 in {value for row in plan.schedule for value in row}


@pytest.mark.parametrize("policy", ["toca", "duca", "clusca"])
def test_neutral_settings_are_the_original(run, policy):
    image, net = run(policy, interval=1)
    assert torch.equal(image, run.expected)
    assert net.plan.cache_bytes == 0


def test_ras_where_the_output_has_tokens(run):
    if run.name == "unet":
        with pytest.raises(PolicyError, match=r"ras needs an output \[batch, tokens, channels\].*\[2, 4, 16, 16\]"):
            run("ras")
        return
    image, net = run("ras")
    assert psnr(image, run.expected) > 41.5
    assert net.plan.speedup > 1.1
    assert net.sessions.counts.missed == 0
    assert not any(name.endswith("/mlp.1") for name in net.plan.sites)  # text alone: always active
    assert torch.equal(run("ras", ratio=1)[0], run.expected)


def test_ras_with_all_tokens_is_the_original_to_rounding(run):
    """Ratio 0.999 chooses all 64 image tokens at every partial step, by the same path as fewer."""
    if run.name == "unet":
        with pytest.raises(PolicyError, match="ras needs an output"):
            run("ras", ratio=0.999)
        return
    image, net = run("ras", ratio=0.999)
    assert sum(net.plan.steps_mask) < STEPS
    assert psnr(image, run.expected) > 90


def test_another_step_count_keeps_the_tokens(run):
    """A plan for 12 steps at 9: the calls in between anchors still compute some tokens."""
    partial = []

    def watch(net):
        runner = net.runner
        whole, runner.run = runner.run, lambda *a: partial.append(a[4].row) or whole(*a)

    image, net = run("toca", watch=watch, steps=9)
    assert net.sessions.counts.mapped == 2 * 8  # the first call stands on a level of the plan
    assert net.sessions.counts.forecast == sum(2 in row for row in partial) > 0
    assert torch.isfinite(image).all()


def test_more_tokens_cost_what_they_say(run):
    speedups = [run("toca", ratio=ratio)[1].plan.speedup for ratio in (0, 0.1, 1)]
    assert speedups[0] > speedups[1] > speedups[2] > 1


def test_a_site_that_mixes_tokens_is_refused(run):
    if run.name == "mmdit":
        site, reason = "transformer_blocks.0/attn", "takes a size"
    else:
        site, reason = "down_blocks.0/conv", "mixes tokens, or is not known to leave them apart"
    _, net = run("interval", interval=2)
    form = {"tokens": {"select": "random", "ratio": 0.5}}
    made = make_plan(
        model="m", scheduler="s", levels=(2.0, 1.0), sites=[site], schedule=[[1], [2]],
        predictors=[Predictor("copy")], policy="test", parameters={}, forms=[form],
    )  # fmt: skip
    with pytest.raises(PlanError, match=reason):
        cost(made, net.subject.sites)
