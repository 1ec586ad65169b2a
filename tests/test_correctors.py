"""Correctors: factors, refusals and costs by hand; ICC and FastCache in real runs of the demo pipelines."""

import itertools
import math

import pytest
import torch
from safetensors.torch import save_file

from dcc.discover.sites import Sites, find_sites
from dcc.errors import PlanError, PolicyError
from dcc.passes.base import Correction
from dcc.passes.values import Factor
from dcc.plans.forms import Form
from dcc.plans.plan import Plan, make_plan
from dcc.plans.predictors import Predictor
from dcc.policies import Setting, make_policy
from dcc.quality import mean_psnr, psnr
from dcc.variants.build import build
from dcc.variants.correctors import Factors, corrected, corrections, low_rank, map_flops
from dcc.variants.cost import cost
from dcc.variants.observe import Observer

from .demo_runs import demo_run

pytestmark = pytest.mark.usefixtures("graphs")

COPY = Predictor("copy")
LOW_RANK = {"corrector": {"kind": "low_rank", "rank": 3, "channels": None}}


@pytest.fixture(scope="module")
def sites(transformer):
    return find_sites(transformer.captured, transformer.call)


def plan_of(site, form, mask=(1, 0, 0, 1), predictor=COPY):
    return make_plan(
        model="m",
        scheduler="s",
        levels=range(len(mask), 0, -1),
        sites=[site],
        schedule=[[v] for v in mask],
        predictors=[predictor],
        policy="test",
        parameters={},
        forms=[form],
    )


def linear_form(path):
    return {"corrector": {"kind": "linear", "weights": str(path)}}


# Sites


def test_linear_layers_are_found_when_asked_for(sites):
    before = list(sites.named)
    found = sites.select("linears")
    names = [f"linear:blocks.{b}.{path}" for b in (0, 1) for path in ("qkv", "mlp.0", "mlp.2")]
    assert [site.name for site in found] == names  # not the gates: they have no tokens
    assert sites["linear:blocks.1.qkv"] == found[3]
    assert list(sites.named) == before  # neither listed nor among the branches
    assert {s.name for s in sites.select("branches")}.isdisjoint(names)


def test_a_denoiser_without_blocks_has_no_linear_sites(transformer):
    with pytest.raises(PolicyError, match="icc needs linear layers inside repeated blocks"):
        make_policy("icc", Setting(range(4), Sites(transformer.captured, transformer.call)), {})


# Factors


def test_factors_are_the_best_of_their_rank():
    weight = torch.randn(6, 8)
    down, up = low_rank(Correction("h", 0, "x", ((3, 8), (6, 3)), weight="w"), weight)
    assert (down.shape, up.shape) == ((3, 8), (6, 3))
    spectrum = torch.linalg.svdvals(weight)
    assert float((weight - up @ down).norm()) == pytest.approx(float(spectrum[3:].norm()), rel=1e-5)


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_factors_of_full_rank_are_the_weight(shape):
    weight = torch.randn(shape)
    down, up = low_rank(Correction("h", 0, "x", ((6, shape[1]), (shape[0], 6)), weight="w"), weight)
    torch.testing.assert_close(up @ down, weight, atol=1e-5, rtol=0)


def test_channels_that_matter_are_approximated_better(tmp_path):
    weight, channels = torch.randn(6, 8), torch.tensor([10.0, 10, 10, 0.1, 0.1, 0.1, 0.1, 0.1])
    save_file({"h": channels}, tmp_path / "channels.safetensors")
    shapes = ((3, 8), (6, 3))
    plain = low_rank(Correction("h", 0, "x", shapes, weight="w"), weight)
    weighed = low_rank(Correction("h", 0, "x", shapes, "w", str(tmp_path / "channels.safetensors"), "h"), weight)

    def error(factors, scale):
        return float(((weight - factors[1] @ factors[0]) * scale).norm())

    assert error(weighed, channels) < 0.2 * error(plain, channels)
    assert error(weighed, 1.0) > error(plain, 1.0)


def test_factors_follow_the_live_weight_and_are_made_once():
    factors, made = Factors(), Correction("h", 0, "x", ((2, 4), (4, 2)), weight="w")

    def bound(weight):
        matrices = factors.of(made, weight, own=True)
        return {Factor(made, index).name: matrix for index, matrix in enumerate(matrices)}

    weight = torch.randn(4, 4)
    first = bound(weight)
    assert set(first) == {"factor_h_0_0", "factor_h_0_1"}
    assert bound(weight)["factor_h_0_0"] is first["factor_h_0_0"]
    weight.mul_(2)
    second = bound(weight)
    torch.testing.assert_close(second["factor_h_0_1"] @ second["factor_h_0_0"],
                               2 * first["factor_h_0_1"] @ first["factor_h_0_0"])  # fmt: skip
    third = bound(weight.to(torch.bfloat16))
    assert third["factor_h_0_0"].dtype == torch.bfloat16


# Plans


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"kind": "magic"}, "'kind' is one of low_rank, linear"),
        ({"kind": "low_rank", "rank": 3}, "must have kind, rank, channels; it has kind, rank"),
        ({"kind": "low_rank", "rank": 0, "channels": None}, "whole number of 1 or more as its 'rank'"),
        ({"kind": "low_rank", "rank": 3, "channels": 7}, "path as 'channels'"),
        ({"kind": "linear", "weights": None}, "path as its 'weights'"),
    ],
)
def test_malformed_forms(spec, problem):
    with pytest.raises(PlanError, match=problem):
        Form.from_json({"corrector": spec})
    with pytest.raises(PlanError, match="plan field 'forms' 'corrector'"):
        plan_of("linears", {"corrector": spec})


def test_a_plan_keeps_its_correctors(tmp_path):
    plan = plan_of("linears", LOW_RANK)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.anchors == 1


def test_costs(sites):
    """Attention and everything but the layers stays; the maps run at every step."""
    priced = cost(plan_of("linears", LOW_RANK), sites)
    group = sites.select("linears")
    layers = sum(sites.costs[site.ports[0].out].flops for site in group)
    made = corrections(Form.from_json(LOW_RANK), group, sites)
    maps = map_flops(made, sites)
    assert maps == sum(2 * 12 * 3 * (site.shapes[0][-1] + c.shapes[0][1])
                       for site, c in zip(group, made, strict=True))  # fmt: skip
    assert priced.flops_uncached == 4 * sites.flops
    assert priced.flops == 4 * sites.flops - 2 * layers + 4 * maps
    assert priced.cache_bytes == sum(site.bytes for site in group)


def test_an_all_compute_plan_has_no_maps(transformer, sites):
    plan = plan_of("linears", LOW_RANK, (1, 1, 1))
    assert cost(plan, sites).speedup == 1.0
    (variant,) = build(plan, sites, Observer()).variants.values()
    assert not any(isinstance(value, Factor) for value in variant.takes)
    assert not any(name.startswith("factor") for name in variant.inputs)


@pytest.mark.parametrize(
    ("site", "tensors", "message"),
    [
        ("blocks.0/mlp", {}, "'blocks.0/mlp' is no residual of tokens"),
        ("blocks.0", {}, "has no tensor 'blocks.0.weight', 'blocks.0.bias'"),
        ("blocks.0", {"blocks.0.weight": torch.eye(7), "blocks.0.bias": torch.zeros(7)},
         r"'blocks.0' has shapes \[\(7, 7\), \(7,\)\]; the site needs \[\(8, 8\), \(8,\)\]"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(sites, tmp_path, site, tensors, message):
    save_file(tensors or {"other": torch.zeros(1)}, tmp_path / "maps.safetensors")
    with pytest.raises(PlanError, match=message):
        cost(plan_of(site, linear_form(tmp_path / "maps.safetensors")), sites)


def test_other_bad_sites_and_files(sites, tmp_path):
    with pytest.raises(PlanError, match=r"'blocks.0/mlp' is no linear layer"):
        cost(plan_of("blocks.0/mlp", LOW_RANK), sites)
    with pytest.raises(PlanError, match=r"nowhere\.safetensors: cannot be read: No such file"):
        cost(plan_of("blocks.0", linear_form(tmp_path / "nowhere.safetensors")), sites)
    save_file({"linear:blocks.0.qkv": torch.ones(3)}, tmp_path / "channels.safetensors")
    form = {"corrector": {"kind": "low_rank", "rank": 3, "channels": str(tmp_path / "channels.safetensors")}}
    with pytest.raises(PlanError, match=r"'linear:blocks.0.qkv' has shape \[3\]; the layer takes 8 channels"):
        cost(plan_of("linear:blocks.0.qkv", form), sites)


def test_analyses_see_the_value_that_a_map_takes(sites):
    (site,) = sites.select("linear:blocks.0.mlp.2")
    made = corrections(Form.from_json(LOW_RANK), [site], sites)
    assert corrected(site, made, live=False).ports[0].base == made[0].source
    assert corrected(site, made).ports[0].base == made[0].name
    assert corrected(site, []) is site


# Real runs


def test_full_rank_forecasts_are_exact():
    """With W_r = W nothing is lost: the corrected copy of every layer is the layer, however old its anchor."""
    run = demo_run("mmdit")
    images, net = run("icc", rank=10_000, interval=run.setting.steps)
    assert sum(net.plan.steps_mask) == 1
    assert run.psnr(images) > 75


@pytest.mark.parametrize(("name", "floor"), [("mmdit", 40), ("unet", 41)])
def test_icc_improves_on_copies(name, floor):
    run = demo_run(name)
    images, net = run("icc")
    copies, plain = run("interval", interval=2, site="linears")
    assert net.sessions.counts.missed == 0 and net.sessions.counts.forecast > 0
    assert run.psnr(images) > max(floor, run.psnr(copies))
    assert 1.05 < net.plan.speedup < plain.plan.speedup


def test_more_rank_is_better_and_costs_more():
    run = demo_run("mmdit")
    images, net = zip(*(run("icc", rank=rank) for rank in (8, 32)), strict=True)
    assert run.psnr(images[1]) > run.psnr(images[0]) + 2
    assert net[1].plan.speedup < net[0].plan.speedup


@pytest.mark.parametrize("name", ["mmdit", "unet"])
def test_icc_of_one_step_is_the_original(name):
    run = demo_run(name)
    assert torch.equal(run("icc", interval=1)[0], run.expected)


def test_fastcache(tmp_path):
    """Maps that give back what enters leave a block out, as hooks on the original module's blocks do."""
    run, tensors = demo_run("mmdit"), {}
    for block in run.sites.order:
        for index, shape in enumerate(run.sites[block.path].shapes):
            key = block.path if index == 0 else f"{block.path}.{index}"
            tensors |= {f"{key}.weight": torch.eye(shape[2]), f"{key}.bias": torch.zeros(shape[2])}
    save_file(tensors, tmp_path / "maps.safetensors")
    maps = str(tmp_path / "maps.safetensors")
    images, net = run("fastcache", weights=maps, threshold=0.07)
    assert net.sessions.counts.forecast > 0 and net.sessions.counts.missed == 0
    assert net.plan.speedup > 1.1 and run.psnr(images) > 18
    masks = dict(zip(net.plan.sites, zip(*net.plan.schedule, strict=True), strict=True))

    def left_out(path):
        calls = itertools.count()

        def hook(_, args, kwargs, output):
            entering = (kwargs["hidden_states"], kwargs["encoder_hidden_states"])
            alike = tuple(next(value for value in entering if value.shape == out.shape) for out in output)
            return output if masks[path][next(calls) % run.setting.steps] else alike

        return hook

    blocks = [(path, run.target.module.get_submodule(path)) for path in masks]
    handles = [block.register_forward_hook(left_out(path), with_kwargs=True) for path, block in blocks]
    try:
        expected = run.images()
    finally:
        for handle in handles:
            handle.remove()
    assert mean_psnr(psnr(images, expected, 1.0)) > 70
    assert torch.equal(run("fastcache", weights=maps, threshold=0.0)[0], run.expected)


def test_fastcache_masks_and_refusals(tmp_path):
    run = demo_run("mmdit")
    policy = make_policy("fastcache", run.setting, {"weights": "maps", "threshold": math.inf, "first": 2})
    assert [c.site for c in policy.caches] == [block.path for block in run.sites.order]
    assert {c.mask for c in policy.caches} == {(1, 1, *[0] * 10)}
    policy = make_policy("fastcache", run.setting, {"weights": "maps", "interval": 4})
    assert {c.mask for c in policy.caches} == {(1, 0, 0, 0) * 3}
    with pytest.raises(PolicyError, match=r"fastcache needs weights=<safetensors file>"):
        make_policy("fastcache", run.setting, {})
    with pytest.raises(PolicyError, match="threshold=-1 must be"):
        make_policy("fastcache", run.setting, {"weights": "maps", "threshold": -1})


def test_fastcache_refuses_a_unet(tmp_path):
    run = demo_run("unet")
    save_file({"other": torch.zeros(1)}, tmp_path / "maps.safetensors")
    with pytest.raises(PlanError, match=r"'down_blocks.0' is no residual of tokens"):
        run.plan("fastcache", weights=str(tmp_path / "maps.safetensors"), interval=2)
