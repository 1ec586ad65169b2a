"""Saving, copying and pickling while compiled: files and copies are the original, and the plan lies beside it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import dcc
from dcc.errors import AlreadyCompiledError, PipelineError
from dcc.record.seam import handler_of

from .nets import Net, sample

pytestmark = pytest.mark.usefixtures("graphs")

PROMPT = "a red circle"
PARTS = {"mmdit": "transformer", "unet": "unet"}


def settings(name: str) -> dict[str, Any]:
    return {**dcc.demo.settings(name), "num_inference_steps": 4}


def image(pipe: Any, name: str) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="pt", **settings(name)).images


@pytest.fixture(scope="module", params=PARTS)
def compiled(request: pytest.FixtureRequest) -> tuple[str, Any, torch.Tensor]:
    """The name of a demo pipeline, the pipeline compiled, and its uncached image."""
    pipe = dcc.demo.load(request.param)
    expected = image(pipe, request.param)
    dcc.compile(pipe, [PROMPT], policy="interval", interval=2, backend="eager", **settings(request.param))
    return request.param, pipe, expected


def test_a_saved_pipeline_is_the_original_with_its_plan_beside_it(compiled: Any, tmp_path: Path):
    name, pipe, expected = compiled
    plain = dcc.demo.load(name)
    plain.save_pretrained(tmp_path / "plain")
    pipe.save_pretrained(tmp_path / "own")
    theirs, ours = (
        {path.relative_to(tmp_path / part) for path in (tmp_path / part).rglob("*") if path.is_file()}
        for part in ("plain", "own")
    )
    plan = Path(PARTS[name], "dcc", "plan.json")
    assert ours - theirs == {plan} and theirs <= ours
    index = [(tmp_path / part / "model_index.json").read_text() for part in ("plain", "own")]
    assert index[0] == index[1]
    assert dict(pipe.config) == dict(plain.config)

    twin, again = (DiffusionPipeline.from_pretrained(tmp_path / part) for part in ("plain", "own"))
    assert handler_of(getattr(again, PARTS[name])) is None
    assert torch.equal(image(again, name), image(twin, name))
    assert dcc.Plan.load(tmp_path / "own" / plan) == dcc.compiled(pipe).plan
    assert not torch.equal(image(pipe, name), expected)  # which is compiled as before


def test_the_denoiser_alone_is_saved_with_its_plan(compiled: Any, tmp_path: Path):
    name, pipe, _ = compiled
    net = getattr(pipe, PARTS[name])
    net.save_pretrained(tmp_path / "net")
    again = type(net).from_pretrained(tmp_path / "net")
    weights = again.state_dict()
    assert list(weights) == list(net.state_dict())
    assert all(torch.equal(weights[key], value) for key, value in net.state_dict().items())
    assert dcc.Plan.load(tmp_path / "net" / "dcc" / "plan.json") == dcc.compiled(pipe).plan
    dcc.restore(pipe)
    try:
        net.save_pretrained(tmp_path / "plain")
        assert not (tmp_path / "plain" / "dcc").exists()
    finally:
        dcc.compile(pipe, [PROMPT], policy="interval", interval=2, backend="eager", **settings(name))


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_a_file,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what pickles a tokenizer
def test_a_copy_of_a_pipeline_is_the_original(compiled: Any, how: str):
    name, pipe, expected = compiled
    twin = COPIES[how](pipe)
    assert type(twin) is type(pipe) and handler_of(getattr(twin, PARTS[name])) is None
    assert torch.equal(image(twin, name), expected)
    assert isinstance(dcc.compiled(pipe), dcc.CompiledDenoiser)


@pytest.mark.parametrize("how", [*COPIES, "copy"])
def test_a_copy_of_a_module_is_the_original(how: str):
    net = dcc.compile(Net().eval(), [1.0], sample=sample, policy="interval", interval=2, backend="eager")
    twin = (COPIES | {"copy": copy.copy})[how](net)
    assert handler_of(twin) is None and torch.equal(twin.weight, net.weight)
    assert torch.equal(sample(twin, 2.0), sample(Net(), 2.0))
    assert not torch.equal(sample(net, 2.0), sample(Net(), 2.0))


@pytest.mark.parametrize("how", [*COPIES, "copy"])
def test_a_compiled_denoiser_says_what_to_copy_instead(how: str):
    net = dcc.compile(Net().eval(), [1.0], sample=sample, policy="interval", backend="eager")
    with pytest.raises(PipelineError, match=r"a CompiledDenoiser holds .* cannot be copied; copy the pipeline"):
        (COPIES | {"copy": copy.copy})[how](dcc.compiled(net))


def compile_again(model: Any, **options: Any) -> Any:
    return dcc.compile(model, [1.0], sample=sample, policy="interval", backend="eager", **options)


class Outer(nn.Module):
    """Holds a denoiser."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.inner(x, time)


def in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


TORCH = {
    "torch.compile": (lambda: torch.compile(Net().eval(), backend="eager"), r"OptimizedModule is wrapped by torch"),
    "a part of it": (
        lambda: Outer(torch.compile(Net().eval(), backend="eager")).eval(),
        r"\.inner of Outer is wrapped by torch",
    ),
    ".compile()": (lambda: in_place(Net().eval()), r"Net: \.compile\(\) was called on it"),
    ".compile() on a part": (lambda: Outer(in_place(Net().eval())).eval(), r"was called on \.inner of Outer"),
}


@pytest.mark.parametrize("how", TORCH)
def test_what_torch_has_compiled_is_named_as_that(how: str):
    make, message = TORCH[how]
    net = make()
    for function in (compile_again, lambda net: dcc.calibrate(net, [1.0], sample=sample)):
        with pytest.raises(PipelineError, match=message) as caught:
            function(net)
        assert type(caught.value) is PipelineError


def test_what_dcc_has_compiled_is_named_as_that():
    net = compile_again(Net().eval())
    for model in (net, Outer(net).eval(), torch.compile(net, backend="eager")):
        for function in (compile_again, lambda net: dcc.calibrate(net, [1.0], sample=sample)):
            with pytest.raises(AlreadyCompiledError, match=r"Net.* is compiled by dcc already; dcc\.restore it first"):
                function(model)


def test_a_compiled_denoiser_is_no_model():
    net = dcc.compiled(compile_again(Net().eval()))
    for function in (
        compile_again,
        lambda net: dcc.plan(net, [1.0] * 4, sample=sample),
        lambda net: dcc.calibrate(net, [1.0], sample=sample),
        lambda net: dcc.evaluate(net, ["interval"], [1.0], sample=sample),
        dcc.restore,
    ):
        with pytest.raises(PipelineError, match="CompiledDenoiser"):
            function(net)
    assert "output" in dcc.sites(net) and dcc.compiled(net) is net
