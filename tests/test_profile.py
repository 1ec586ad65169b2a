"""Profiles: what follows from a Gram matrix, files that come back whole, and files that are refused by name."""

import json
import os
from dataclasses import fields, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import dcc
from dcc.errors import ProfileError
from dcc.measure.profile import Profile, SiteCost
from dcc.plans.predictors import Predictor
from dcc.record.fingerprint import fingerprint, weights_hash
from dcc.tensor_file import checksum

STEPS = 6


def synthetic(features, levels=None, sites=None, streams=("cond",), **changes):
    """A profile of given features [streams, sites, S, n]."""
    features = features.double()
    steps, count = features.shape[2], features.shape[1]
    sites = sites or ["output", "stack", *(f"blocks.{i}" for i in range(count - 2))]
    change = torch.zeros(features.shape[:3], dtype=torch.float64)
    change[:, :, 1:] = features.diff(dim=2).abs().sum(-1) / features[:, :, :-1].abs().sum(-1).clamp_min(1e-9)
    gram = features @ features.mT
    values = {
        "model": "0123456789abcdef",
        "weights": "fedcba9876543210",
        "scheduler": "DDIMScheduler",
        "dtype": "float32",
        "levels": tuple(levels or (1000.0 - 100 * s for s in range(steps))),
        "streams": streams,
        "costs": tuple(SiteCost(name, "residual", 1000, 4096, 0.001) for name in sites),
        "default": "stack",
        "flops": 10_000,
        "seconds": 0.01,
        "prompts": 4,
        "seed": 0,
        "probed": (1, 4),
        "sensitivity_scale": 0.5,
        "gram": (gram + gram.mT) / 2,
        "neighbours": change.float(),
        "sensitivity": torch.linspace(0.5, 1.5, steps),
        "settings": {"num_inference_steps": steps},
        "versions": {"torch": "2"},
    }
    return Profile(**values | changes)


@pytest.fixture
def features():
    """Two streams, three sites, STEPS steps on a smooth path, 40 numbers each."""
    base, slope, noise = torch.randn(3, 2, 3, 1, 40, dtype=torch.float64)
    s = torch.arange(STEPS, dtype=torch.float64)[:, None]
    return base + 0.1 * slope * s + 0.5 * noise * torch.sin(s)


@pytest.fixture
def profile(features):
    return synthetic(features, streams=("cond", "uncond"))


def test_similarity_is_the_cosine(profile, features):
    expected = torch.nn.functional.cosine_similarity(features[1, 1][:, None], features[1, 1][None], dim=-1)
    assert torch.allclose(profile.similarity("stack", "uncond"), expected)
    assert torch.equal(profile.similarity("stack"), profile.similarity("stack", "cond"))
    assert profile.norms("stack", "uncond") == pytest.approx(features[1, 1].norm(dim=-1))


def test_similarity_of_a_value_that_is_zero(features):
    features[0, 1, 2] = 0
    similarity = synthetic(features, streams=("cond", "uncond")).similarity("stack")
    assert bool((similarity[2] == 0).all())
    assert bool(similarity.isfinite().all())


@pytest.mark.parametrize("rule", [Predictor("copy"), Predictor("taylor", 2), Predictor("newton", 3)], ids=str)
def test_error_of_a_predictor_is_that_of_its_forecasts(profile, features, rule):
    step, anchors = 5, [3, 2, 1, 0][: rule.anchors]
    coefficients = rule.coefficients(step, anchors)
    for stream, name in enumerate(profile.streams):
        values = features[stream, 1]
        forecast = sum(a * values[s] for a, s in zip(coefficients, anchors, strict=True))
        expected = float((forecast - values[step]).norm() / values[step].norm())
        assert profile.error("stack", step, anchors, coefficients, name) == pytest.approx(expected, rel=1e-5)


def test_error_of_no_anchor_and_of_the_step_itself(profile):
    assert profile.error("stack", 3, [], []) == pytest.approx(1.0)
    assert profile.error("stack", 3, [3], [1.0]) == 0.0


def test_error_where_the_value_is_zero(features):
    features[:, 1, 2] = 0
    profile = synthetic(features, streams=("cond", "uncond"))
    assert profile.error("stack", 2, [1], [1.0]) == float("inf")
    assert profile.error("stack", 2, [1], [0.0]) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.similarity("nowhere"), r"no site 'nowhere' in this profile; it has: output, stack, blocks\.0"),
        (lambda p: p.similarity("stack", "other"), r"no stream 'other' in this profile; it has: cond, uncond"),
        (lambda p: p.error("stack", 6, [0], [1.0]), r"step 6 is not among the profile's steps 0 to 5"),
        (lambda p: p.error("stack", 3, [-1], [1.0]), r"step -1 is not among"),
        (lambda p: p.error("stack", 3, [1, 0], [1.0]), r"2 anchors and 1 coefficients"),
    ],
    ids=["site", "stream", "step", "anchor", "lengths"],
)
def test_bad_questions_are_refused(profile, call, message):
    with pytest.raises(ProfileError, match=message):
        call(profile)


def test_file_comes_back_whole(profile, tmp_path):
    profile.save(tmp_path / "p.safetensors")
    again = dcc.Profile.load(tmp_path / "p.safetensors")
    for field in fields(Profile):
        own, other = getattr(profile, field.name), getattr(again, field.name)
        assert torch.equal(own, other) if isinstance(own, torch.Tensor) else own == other, field.name
    assert os.listdir(tmp_path) == ["p.safetensors"]


def test_header_can_be_read_without_dcc(profile, tmp_path):
    profile.save(tmp_path / "p.safetensors")
    with safe_open(str(tmp_path / "p.safetensors"), framework="pt") as file:
        header = json.loads(file.metadata()["header"])
    assert header["scheduler"] == "DDIMScheduler"
    assert header["costs"][1]["name"] == "stack"
    assert header["levels"][0] == 1000.0


def test_a_failed_write_leaves_the_old_file(profile, tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    profile.save(path)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        replace(profile, prompts=5).save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("streams", [("main",), ("cond", "uncond")], ids=["one stream", "two streams"])
def test_fifty_steps_and_sixty_blocks_fit_in_five_megabytes(tmp_path, streams):
    names = [f"{kind}transformer_blocks.{i}{branch}" for i in range(60) for kind, branch in BRANCHES]
    sites = ["output", "hidden", "stack", *names]
    features = torch.randn(len(streams), len(sites), 50, 60)
    synthetic(features, sites=sites, streams=streams).save(tmp_path / "p.safetensors")
    assert (tmp_path / "p.safetensors").stat().st_size < 5e6
    assert Profile.load(tmp_path / "p.safetensors").sites == tuple(sites)


BRANCHES = [("", ""), ("", "/attn"), ("", "/mlp")]


def rewritten(path, header=None, tensors=None, **metadata):
    """The file at `path` with other contents and a checksum that fits them, unless that is given."""
    with safe_open(str(path), framework="pt") as file:
        own = dict(file.metadata())
        values = {name: file.get_tensor(name) for name in file.keys()}
    values = {name: value for name, value in (values | (tensors or {})).items() if value is not None}
    text = header
    if not isinstance(header, str):
        fresh = json.loads(own["header"]) | (header or {})
        text = json.dumps({name: value for name, value in fresh.items() if value is not None})
    own |= {"header": text, "checksum": checksum("dcc_profile", 2, text, values)} | metadata
    save_file(values, str(path), {name: value for name, value in own.items() if value is not None})


NAN = float("nan")
GRAM = torch.zeros(2, 3, 21, dtype=torch.float64)
MALFORMED = {
    "a field is missing": ({"header": {"scheduler": None}}, "field 'scheduler' is missing"),
    "a field is unknown": ({"header": {"flavour": 1}}, "field 'flavour' is unknown"),
    "the mark is missing": ({"dcc_profile": None}, "the field 'dcc_profile' is missing"),
    "another version": ({"dcc_profile": "99"}, "field 'dcc_profile' is '99'; this version of dcc reads 2"),
    "the header is no JSON": ({"header": "{"}, "field 'header' is not JSON"),
    "the header is no object": ({"header": "[]"}, "field 'header' is not a JSON object"),
    "another checksum": ({"checksum": "0" * 64}, "field 'checksum' does not fit"),
    "no checksum": ({"checksum": None}, "field 'checksum' does not fit"),
    "a hash that is none": ({"header": {"weights": "xyz"}}, "field 'weights' must be 16 hexadecimal digits, not 'xyz'"),
    "a model that is none": ({"header": {"model": "0123"}}, "field 'model' must be 16 hexadecimal digits"),
    "a number for a string": ({"header": {"dtype": 32}}, "field 'dtype' must be a non-empty string"),
    "a level that is NaN": ({"header": {"levels": [NAN] * 6}}, "field 'levels' holds a malformed entry"),
    "too few levels": ({"header": {"levels": [1.0] * 5}}, r"field 'gram' has shape \[2, 3, 21\]"),
    "no levels": ({"header": {"levels": []}}, "field 'gram' has shape"),
    "a negative count": ({"header": {"prompts": -1}}, "field 'prompts' must be a whole number from 0 on"),
    "a fractional count": ({"header": {"flops": 1.5}}, "field 'flops' must be a whole number from 0 on"),
    "a default that is no site": ({"header": {"default": "nowhere"}}, "field 'default' is 'nowhere'"),
    "a site without name": ({"header": {"costs": [{"kind": "x"}]}}, "field 'costs' is malformed"),
    "costs that are numbers": ({"header": {"costs": [1, 2]}}, "field 'costs' is malformed"),
    "too many streams": ({"header": {"streams": ["a", "b", "c"]}}, r"field 'gram' has shape \[2, 3, 21\], not"),
    "a step beyond the last": ({"header": {"probed": [6]}}, "field 'probed' names a step beyond the 6 levels"),
    "a tensor is missing": ({"tensors": {"gram": None}}, "field 'gram' is missing"),
    "a tensor of another size": ({"tensors": {"neighbours": torch.zeros(2, 3, 5)}}, "field 'neighbours' has shape"),
    "a tensor of another dtype": ({"tensors": {"gram": GRAM.float()}}, "field 'gram' must be torch.float64"),
    "NaN in a tensor": ({"tensors": {"sensitivity": torch.full((6,), NAN)}}, "field 'sensitivity' holds NaN"),
    "infinity in a tensor": ({"tensors": {"gram": GRAM + float("inf")}}, "field 'gram' holds NaN or infinite"),
    "negative norms": ({"tensors": {"gram": GRAM - 1}}, "field 'gram' has a negative squared norm"),
    "a negative change": ({"tensors": {"neighbours": torch.zeros(2, 3, 6) - 1}}, "field 'neighbours' holds negative"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_by_file_and_field(profile, tmp_path, name):
    changes, message = MALFORMED[name]
    path = tmp_path / "p.safetensors"
    profile.save(path)
    rewritten(path, **changes)
    with pytest.raises(ProfileError, match=rf"p\.safetensors: .*{message}"):
        Profile.load(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_truncated_files_are_refused(profile, tmp_path, keep):
    path = tmp_path / "p.safetensors"
    profile.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ProfileError, match=r"p\.safetensors: not a safetensors file, or cut short"):
        Profile.load(path)


@pytest.mark.parametrize("data", [b"{}", b"\x00" * 64, os.urandom(500)], ids=["json", "zeros", "noise"])
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "p.safetensors"
    path.write_bytes(data)
    with pytest.raises(ProfileError, match=r"p\.safetensors: not a safetensors file"):
        Profile.load(path)


def test_one_flipped_bit_is_found(profile, tmp_path):
    path = tmp_path / "p.safetensors"
    profile.save(path)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(ProfileError, match="field 'checksum'"):
        Profile.load(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(ProfileError, match="cannot be read"):
            Profile.load(path)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("table", torch.arange(5))


@pytest.fixture
def fitting(profile):
    """A module and the profile that claims it."""
    net = Net()
    return net, replace(profile, model=fingerprint(net), weights=weights_hash(net))


def test_check_takes_its_own_module(fitting):
    net, profile = fitting
    profile.check(net, "DDIMScheduler", torch.float32)
    profile.check(net, "DDIMScheduler")
    profile.check(net, type("DDIMScheduler", (), {})(), "float32")


def test_check_names_what_differs(fitting):
    net, profile = fitting
    with pytest.raises(ProfileError, match=r"another scheduler: it has scheduler DDIMScheduler, this run has Euler"):
        profile.check(net, "Euler", torch.float32)
    with pytest.raises(ProfileError, match=r"another dtype: it has dtype float32, this run has bfloat16"):
        profile.check(net.bfloat16(), "DDIMScheduler")
    with pytest.raises(ProfileError, match="another weights"):
        profile.check(Net(), "DDIMScheduler", torch.float32)
    with pytest.raises(ProfileError, match="another model"):
        profile.check(nn.Linear(3, 3), "DDIMScheduler", torch.float32)


def test_weights_hash_follows_the_weights():
    net = Net()
    own = weights_hash(net)
    assert own == weights_hash(net)
    assert len(own) == 16
    same = Net()
    assert weights_hash(same) != own
    same.load_state_dict(net.state_dict())
    assert weights_hash(same) == own
    with torch.no_grad():
        same.linear.bias.add_(1e-6)
    assert weights_hash(same) != own
    assert weights_hash(nn.Linear(3, 3, device="meta")) == weights_hash(nn.Linear(3, 3, device="meta"))
    assert weights_hash(nn.ReLU())  # no weights at all


def test_prints_as_a_table(profile):
    text = str(profile)
    assert "4 prompts, DDIMScheduler, 6 steps, float32" in text
    assert "stack *" in text
    assert "2 of 6 steps probed" in text


def test_one_step_prints_and_plots(features, tmp_path):
    single = synthetic(features[:, :, :1], streams=("cond", "uncond"), probed=(0,))
    assert "1 step," in str(single)
    single.plot(tmp_path / "p.png")


def test_plot_writes_the_format_of_the_suffix(profile, tmp_path):
    profile.plot(tmp_path / "p.png")
    profile.plot(tmp_path / "p.svg")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert "svg" in (tmp_path / "p.svg").read_text()[:400]
