"""FreqCa and HyCa: plans by hand, and real runs of the demo pipelines."""

import pytest
import torch

from dcc.discover.sites import find_sites
from dcc.errors import PlanError, PolicyError
from dcc.plans.forms import Form
from dcc.plans.predictors import Predictor
from dcc.policies import Setting, make_policy
from dcc.policies.hybrid import SOLVERS
from dcc.variants.forms import form_of

from . import tiny
from .demo_runs import demo_run

pytestmark = pytest.mark.usefixtures("graphs")

HIGH = Predictor("hermite", 2, (("sigma", 0.71),))


@pytest.fixture(scope="module")
def setting(transformer):
    return Setting(range(12), find_sites(transformer.captured, transformer.call))


@pytest.fixture(scope="module", params=["mmdit", "unet"])
def run(request):
    return demo_run(request.param)


def one(setting, policy, **parameters):
    (cached,) = make_policy(policy, setting, parameters).caches
    return cached


def test_freqca_of_tokens_in_a_line(setting):
    cached = one(setting, "freqca")
    assert (cached.site, "".join(map(str, cached.mask))) == ("hidden", "111000001000")
    bands = cached.form["bands"]
    assert (bands["transform"], bands["cutoff"], bands["grid"]) == ("fft", 0.1, None)
    assert [Predictor.from_json(data) for data in bands["predictors"]] == [Predictor("copy"), HIGH]


def test_freqca_of_a_given_grid(setting):
    bands = one(setting, "freqca", grid=(2, 3), low_order=1).form["bands"]
    assert (bands["transform"], bands["grid"]) == ("dct", [2, 3])
    assert Predictor.from_json(bands["predictors"][0]) == Predictor("taylor", 1)


def test_freqca_finds_the_grid_of_packed_tokens():
    setting = Setting(range(12), tiny.sites("flux"))
    bands = one(setting, "freqca").form["bands"]
    assert (bands["transform"], bands["grid"]) == ("dct", [4, 6])
    assert one(setting, "freqca", transform="fft").form["bands"]["grid"] is None


@pytest.mark.parametrize(
    ("policy", "parameters", "message"),
    [
        ("freqca", {"transform": "haar"}, "there are: auto, dct, fft"),
        ("freqca", {"transform": "dct"}, r"the grid of the 6 tokens of 'hidden' is not known"),
        ("freqca", {"grid": [2, 2]}, "whose tokens do not fill that grid"),
        ("freqca", {"cutoff": 1.5}, "cutoff=1.5 must be"),
        ("freqca", {"order": 9}, "order=9"),
        ("hyca", {"clusters": 0}, "clusters=0 must be"),
        ("hyca", {"judged": "twice"}, "there are: next, schedule"),
        ("hyca", {}, "needs recorded values"),
    ],
)
def test_bad_parameters(setting, policy, parameters, message):
    with pytest.raises(PolicyError, match=message):
        make_policy(policy, setting, parameters)


def test_pixels_are_no_line_of_tokens():
    setting = Setting(range(12), tiny.sites("unet-sd"))
    bands = one(setting, "freqca").form["bands"]
    assert (bands["transform"], bands["grid"]) == ("dct", None)
    with pytest.raises(PlanError, match=r"bands by 'fft' need \[batch, tokens, channels\]"):
        form_of(Form.from_json(one(setting, "freqca", transform="fft").form), setting.sites.select("hidden"), "hidden")


def test_hyca_gives_each_cluster_its_solver(setting):
    """Channels 0 to 3 are lines, for which Taylor is exact; 4 to 7 jump to and fro, for which a small step is best."""
    lines = torch.arange(12)[:, None, None, None] * (torch.rand(1, 2, 6, 4) + 1)
    noise = torch.randn(12, 2, 6, 4)
    known = Setting(setting.levels, setting.sites, values=lambda site: torch.cat([lines, noise], dim=-1))
    cached = one(known, "hyca", clusters=2)
    assert "".join(map(str, cached.mask)) == "111000010000"
    spec = cached.form["clusters"]
    taylor = spec["predictors"].index(Predictor("taylor", 1).as_json())
    assert spec["of_channel"] == [taylor] * 4 + [1 - taylor] * 4
    other = SOLVERS.index(Predictor.from_json(spec["predictors"][1 - taylor]))
    assert SOLVERS[other].name == "copy"
    alone = Setting(setting.levels, setting.sites, values=lambda site: lines)
    assert (one(alone, "hyca").form, one(alone, "hyca").predictor) == ({}, Predictor("taylor", 1))


def test_the_pool_has_the_published_coefficients():
    found = [solver.coefficients(3, [2, 1, 0]) for solver in SOLVERS]
    assert found[:5] == [[1.0], [1.5, -0.5], [2.0, -1.0], [2.5, -2.0, 0.5], pytest.approx([4 / 3, -1 / 3])]
    assert found[5] == pytest.approx([1 + 5 / 12 * 1.5 + 2 / 3, -5 / 12 * 2 - 2 / 3 - 1 / 12, 5 / 24 + 1 / 12])


@pytest.mark.parametrize("policy", ["freqca", "hyca"])
def test_interval_one_is_the_model_itself(run, policy):
    images, net = run(policy, interval=1)
    assert torch.equal(images, run.expected)
    assert net.plan.speedup == 1


@pytest.mark.parametrize(
    ("policy", "parameters", "floors"),
    [
        ("freqca", {"interval": 3}, {"mmdit": 42, "unet": 29}),
        ("hyca", {"interval": 3, "judged": "schedule", "clusters": 8}, {"mmdit": 44, "unet": 32}),
    ],
)
def test_real_runs(run, policy, parameters, floors):
    images, net = run(policy, **parameters)
    assert run.psnr(images) > floors[run.name]
    assert net.plan.speedup > 1.9
    assert net.sessions.counts.missed == 0 < net.sessions.counts.forecast


def test_a_cutoff_of_one_is_the_low_band_alone(run):
    whole, _ = run("freqca", interval=3, cutoff=1.0)
    low, _ = run("interval", site="hidden", steps_mask=run.plan("freqca", interval=3).steps_mask)
    torch.testing.assert_close(whole, low, atol=2e-3, rtol=0)
