"""Calibration: what it measures is what the eager denoiser does, and a killed one ends in the very same profile."""

import runpy
import signal
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from torch import nn

import dcc
from dcc.errors import CaptureError, PipelineError, ProfileError, PromptError
from dcc.measure.calibrate import MARK, VERSION, gram_matrix, neighbours, probe_steps
from dcc.measure.profile import Profile
from dcc.tensor_file import read_tensors, write_tensors

from . import tiny

pytestmark = pytest.mark.usefixtures("graphs")

LOOP = '''
"""A tiny denoiser of two blocks and its sampling loop; also the other process of the test that kills one."""

import os
import signal
import sys

import torch
from torch import nn

STEPS = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x, gate):
        return x + gate * self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 4)

    def forward(self, x, text, time):
        gate = torch.cos(time)[:, None, None]
        h = self.embed(x) + text[:, None]
        for block in self.blocks:
            h = block(h, gate)
        return self.head(h)


def make():
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def sample(net, prompt, guided=False, steps=STEPS):
    """Euler steps from torch's global generator; `guided` calls the denoiser twice a step."""
    texts = [torch.randn(1, 16, generator=torch.Generator().manual_seed(seed)) for seed in (prompt, 999)]
    x = torch.randn(1, 300, 4)
    for step in range(steps):
        time = torch.full((1,), 1.0 - step / steps)
        outputs = [net(x=x, text=text, time=time) for text in texts[: 2 if guided else 1]]
        x = x - (2 * outputs[0] - outputs[-1]) / steps
    return x


def kill_at(line):
    def progress(text):
        if text == line:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


if __name__ == "__main__":
    import dcc

    torch.set_num_threads(1)
    dcc.calibrate(make(), [1, 2, 3, 4], sample=sample, checkpoint=sys.argv[1], seed=5, progress=kill_at(sys.argv[2]))
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("loop") / "loop.py"
    path.write_text(LOOP)
    return path


@pytest.fixture(scope="module")
def loop(script):
    """The names of the script above."""
    return runpy.run_path(str(script))


@pytest.fixture(scope="module")
def net(loop):
    return loop["make"]()


@pytest.fixture(scope="module")
def profile(loop, net):
    return dcc.calibrate(net, [1, 2, 3, 4], sample=loop["sample"], seed=5)


def assert_same(actual, expected):
    """Equal bit for bit, measured times excepted."""
    for field in fields(Profile):
        own, other = getattr(actual, field.name), getattr(expected, field.name)
        if field.name == "costs":
            assert [(c.name, c.kind, c.flops, c.bytes) for c in own] == [
                (c.name, c.kind, c.flops, c.bytes) for c in other
            ]
        elif isinstance(own, torch.Tensor):
            assert torch.equal(own, other), field.name
        elif field.name != "seconds":
            assert own == other, field.name


def eager_values(loop, net, prompt, seed):
    """Outputs and block residuals of every step of the eager denoiser."""
    outputs, inside, residuals = [], [], []
    handles = [
        net.blocks[1].register_forward_hook(lambda module, args, output: inside.append(output - args[0])),
        net.register_forward_hook(lambda module, args, output: outputs.append(output)),
    ]
    torch.manual_seed(seed)
    with torch.no_grad():
        loop["sample"](net, prompt)
    for handle in handles:
        handle.remove()
    residuals = torch.stack(inside).flatten(1).double()
    return torch.stack(outputs).flatten(1).double(), residuals


def test_what_is_measured_is_what_the_eager_denoiser_does(loop, net, profile):
    gram_of_outputs = gram_of_residuals = moved = size = 0
    for index, prompt in enumerate([1, 2, 3, 4]):
        outputs, residuals = eager_values(loop, net, prompt, 5 + index)
        gram_of_outputs = gram_of_outputs + outputs @ outputs.T / 4
        gram_of_residuals = gram_of_residuals + residuals @ residuals.T / 4
        moved, size = moved + outputs.diff(dim=0).abs().sum(1), size + outputs[:-1].abs().sum(1)
    # 1200 numbers are kept as they are, 4800 are sketched
    assert torch.allclose(profile.matrix("output"), gram_of_outputs, rtol=1e-4)
    assert torch.allclose(profile.matrix("blocks.1"), gram_of_residuals, rtol=0.1)
    assert torch.allclose(profile.change("output")[1:].double(), moved / size, rtol=0.1)
    for anchors, coefficients in (([3], [1.0]), ([3, 2], [2.0, -1.0])):
        weights = torch.zeros(8, dtype=torch.float64)
        weights[5] = 1
        weights[anchors] -= torch.tensor(coefficients, dtype=torch.float64)
        exact = float(weights @ gram_of_residuals @ weights / gram_of_residuals[5, 5]) ** 0.5
        assert profile.error("blocks.1", 5, anchors, coefficients) == pytest.approx(exact, rel=0.1)


def test_what_else_is_in_the_profile(loop, net, profile):
    sites = dcc.sites(net, [1], sample=loop["sample"])
    assert set(profile.sites) == set(sites.named)
    assert profile.default == sites.default
    assert profile.flops == sites.flops
    assert profile.cost("blocks.0").flops == sites["blocks.0"].flops
    assert profile.levels == pytest.approx([1 - s / 8 for s in range(8)])
    assert profile.streams == ("main",)
    assert (profile.prompts, profile.seed, profile.scheduler, profile.dtype) == (4, 5, "sample", "float32")
    assert 0 < profile.cost("blocks.0").seconds < profile.cost("output").seconds <= profile.seconds
    profile.check(net, "sample", torch.float32)


def test_sensitivity_is_measured_at_the_probed_steps_and_interpolated_between(profile):
    assert profile.probed == (2, 6)
    curve = profile.sensitivity
    assert float(curve.mean()) == pytest.approx(1.0)
    assert bool((curve > 0).all())
    assert float(curve[4]) == pytest.approx(float(curve[2] + curve[6]) / 2, rel=1e-4)
    assert float(curve[0]) == pytest.approx(float(curve[2]))
    # a step of this loop moves the sample by a eighth of its output, and what follows hardly corrects it
    assert float(curve[6]) * profile.sensitivity_scale == pytest.approx(1 / 8, rel=0.3)


def test_streams_are_told_apart(loop, net):
    guided = dcc.calibrate(net, [1], sample=lambda net, prompt: loop["sample"](net, prompt, guided=True))
    assert guided.streams == ("main", "main.1")
    assert not torch.allclose(guided.matrix("output", "main"), guided.matrix("output", "main.1"), rtol=1e-3)


def test_the_denoiser_is_left_alone_and_twice_is_the_same(loop, net, profile):
    before = [value.clone() for value in net.state_dict().values()]
    assert_same(dcc.calibrate(net, [1, 2, 3, 4], sample=loop["sample"], seed=5), profile)
    assert all(map(torch.equal, before, net.state_dict().values()))
    assert "forward" not in vars(net)


def test_progress_says_what_happens(loop, net):
    lines = []
    dcc.calibrate(net, [1, 2], sample=loop["sample"], progress=lines.append)
    assert lines == [
        "recording one run",
        "capturing the denoiser",
        "timing the nodes of one call",
        "prompt 1 of 2",
        "disturbing step 3 of 8",
        "prompt 2 of 2",
        "disturbing step 7 of 8",
    ]


@pytest.mark.slow
def test_a_killed_calibration_ends_in_the_same_profile(script, loop, net, profile, tmp_path):
    path = tmp_path / "half.ckpt"
    killed = subprocess.run([sys.executable, str(script), str(path), "prompt 3 of 4"], check=False, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    header, _ = read_tensors(path, MARK, VERSION, ProfileError)
    assert header["done"] == 2
    lines = []
    resumed = dcc.calibrate(net, [1, 2, 3, 4], sample=loop["sample"], seed=5, checkpoint=path, progress=lines.append)
    assert_same(resumed, profile)
    assert resumed.seconds == header["seconds"]
    assert "resuming after prompt 2 of 4" in lines
    assert "prompt 2 of 4" not in lines
    again = dcc.calibrate(net, [1, 2, 3, 4], sample=loop["sample"], seed=5, checkpoint=path, progress=lines.append)
    assert_same(again, profile)


def test_an_error_in_a_run_keeps_what_was_done(loop, net, profile, tmp_path):
    runs = []

    def failing(net, prompt):
        runs.append(prompt)
        if prompt == 3:
            raise KeyError("the disk is full")
        return loop["sample"](net, prompt)

    path = tmp_path / "half.ckpt"
    with pytest.raises(KeyError, match="the disk is full"):
        dcc.calibrate(net, [1, 2, 3, 4], sample=failing, seed=5, checkpoint=path)
    assert_same(dcc.calibrate(net, [1, 2, 3, 4], sample=loop["sample"], seed=5, checkpoint=path), profile)


@pytest.fixture(scope="module")
def checkpoint(loop, net, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "done.ckpt"
    dcc.calibrate(net, [1, 2], sample=loop["sample"], checkpoint=path)
    return path


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("prompts", {"prompts": [1, 3]}),
        ("prompts", {"prompts": [1, 2, 3]}),
        ("seed", {"seed": 1}),
        ("levels", {"steps": 5}),
        ("weights", {"net": "other"}),
        ("dtype", {"net": "double"}),
    ],
)
def test_a_checkpoint_of_another_calibration_is_refused(loop, net, checkpoint, name, changes):
    module = net
    if "net" in changes:
        module = loop["make"]()
        if changes["net"] == "double":
            module.double()
        else:
            nn.init.zeros_(module.head.bias)

    def sample(net, prompt):
        if changes.get("net") == "double":
            with _default_dtype(torch.float64):
                return loop["sample"](net, prompt)
        return loop["sample"](net, prompt, steps=changes.get("steps", 8))

    with pytest.raises(ProfileError, match=rf"done\.ckpt: this checkpoint has another {name} "):
        dcc.calibrate(
            module, changes.get("prompts", [1, 2]), sample=sample, checkpoint=checkpoint, seed=changes.get("seed", 0)
        )


class _default_dtype:
    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)


def test_malformed_checkpoints_are_refused(loop, net, checkpoint, profile, tmp_path):
    def resume(path):
        return dcc.calibrate(net, [1, 2], sample=loop["sample"], checkpoint=path)

    path = tmp_path / "bad.ckpt"
    path.write_bytes(checkpoint.read_bytes()[:-5])
    with pytest.raises(ProfileError, match=r"bad\.ckpt: not a safetensors file, or cut short"):
        resume(path)
    profile.save(path)
    with pytest.raises(ProfileError, match=r"bad\.ckpt: the field 'dcc_calibration' is missing"):
        resume(path)
    header, tensors = read_tensors(checkpoint, MARK, VERSION, ProfileError)
    write_tensors(path, MARK, VERSION, header, {name: tensors[name] for name in ("gram", "size")})
    with pytest.raises(ProfileError, match=r"bad\.ckpt: this checkpoint is malformed: field 'moved' is missing"):
        resume(path)


class Broken(nn.Module):
    """Goes wrong at the last of four noise levels."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, time):
        return self.linear(x) / (time[:, None] > 0.3)


def test_features_that_are_not_finite_are_refused():
    def sample(net, prompt):
        x = torch.randn(2, 4)
        for step in range(4):
            x = net(x=x, time=torch.full((2,), 1 - step / 4)).nan_to_num(0, 0, 0)
        return x

    with pytest.raises(ProfileError, match=r"prompt 1: site 'output' of stream 'main' is NaN or infinite"):
        dcc.calibrate(Broken().eval().requires_grad_(False), [0], sample=sample)


def test_loops_that_differ_from_the_recorded_one_are_refused(loop, net):
    runs = []

    def shorter(net, prompt):
        runs.append(prompt)
        return loop["sample"](net, prompt, steps=8) if len(runs) == 1 else stop_early(net, prompt)

    def stop_early(net, prompt):
        x, text = torch.randn(1, 300, 4), torch.randn(1, 16)
        for step in range(5):
            x = x - net(x=x, text=text, time=torch.full((1,), 1.0 - step / 8)) / 8
        return x

    with pytest.raises(ProfileError, match=r"prompt 1: stream 'main' was called at 5 of 8 steps"):
        dcc.calibrate(net, [1], sample=shorter)


def test_bad_arguments_are_refused(loop, net):
    with pytest.raises(PromptError, match="prompts is empty"):
        dcc.calibrate(net, [], sample=loop["sample"])
    with pytest.raises(PipelineError, match="needs sample=fn"):
        dcc.calibrate(net, [1])
    with pytest.raises(PipelineError, match="takes no pipeline arguments: height"):
        dcc.calibrate(net, [1], sample=loop["sample"], height=64)
    with pytest.raises(CaptureError, match="never called the denoiser"):
        dcc.calibrate(net, [1], sample=lambda net, prompt: None)
    with pytest.raises(PipelineError, match="must return the final sample"):
        dcc.calibrate(net, [1], sample=lambda net, prompt: forget(loop["sample"](net, prompt)))


def forget(value):
    """For a loop that returns nothing."""


@pytest.mark.parametrize("model", ["pixart", "unet-sd"])
def test_real_denoisers(model):
    """Merged batches, cuts and levels; the output is kept exactly."""

    def sample(net, seed):
        return tiny.generate(model, tiny.denoise_with(net), seed)[-1][1]

    profile = dcc.calibrate(tiny.module(model), [0, 1], sample=sample)
    assert profile.streams == ("main",)
    assert set(profile.sites) == set(tiny.sites(model).named)
    gram = 0
    for seed in (0, 1):
        found = tiny.generate(model, tiny.denoise_with(tiny.module(model)), seed)
        outputs = torch.stack([output for output, _ in found]).flatten(1).double()
        gram = gram + outputs @ outputs.T / 2
    assert torch.allclose(profile.matrix("output"), gram, rtol=1e-4)


@pytest.mark.parametrize("prompts", [1, 2, 8, 16, 32, 100])
@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50])
def test_probes_stay_within_their_budget(steps, prompts):
    probes = probe_steps(steps, prompts)
    assert probes == sorted(set(probes))
    assert all(0 <= step < steps for step in probes)
    assert sum(steps - step for step in probes) <= steps * max(1, 0.1 * prompts)
    assert len(probes) <= max(2, 0.2 * prompts + 1)


def test_gram_matrix_keeps_small_differences_of_large_values():
    """The second difference of values of 1e3 is 1e-3; products in float32 alone would lose it."""
    s = torch.arange(6, dtype=torch.float64)[:, None]
    exact = 1000 * torch.randn(1, 5000, dtype=torch.float64) + torch.randn(1, 5000).double() * s
    exact = exact + 0.01 * torch.randn(1, 5000, dtype=torch.float64) * s**2
    rows = exact.float()
    weights = torch.tensor([0.0, 0.0, 0.0, 1.0, -2.0, 1.0], dtype=torch.float64)
    wanted = float((weights @ rows.double()).square().sum())
    assert float(weights @ gram_matrix(rows) @ weights) == pytest.approx(wanted, rel=1e-2)
    plain = (rows @ rows.T).double()
    assert abs(float(weights @ plain @ weights) / wanted - 1) > 1


def test_neighbours_are_relative_to_the_step_before():
    moved, size = neighbours(torch.tensor([[1.0, -1.0], [2.0, -1.0], [0.0, 0.0]]))
    assert moved.tolist() == [0, 1, 3]
    assert size.tolist() == [0, 2, 3]
