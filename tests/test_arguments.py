"""Every argument of every public function: a wrong type or value is a DccError before any work, and says what is good.

The cases of an argument are found by its name; an argument that no case names fails the test.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dcc
from dcc.errors import DccError
from dcc.record.target import PipelineTarget

from .nets import Net, sample

NAN = math.nan
NO_NUMBER = ("3x", True, NAN, math.inf, [2], None, torch.ones(2), 2j)
NO_WHOLE = (*(v for v in NO_NUMBER if v is not None), 1.5, -1, None)
NO_FLAG = ("yes", 1, None, [True])
NO_FUNCTION = (3, "print", [print])
NO_PATH = (3, True, None, b"plan.json", "", "a\0b", ["plan.json"])
NO_PROMPTS = (None, "a red circle", b"x", 3, {"a": 1}, {"a"}, [], (), iter(["a"]), np.array(["a"]), torch.ones(2))
NO_MODEL = (None, 3, "mmdit", dcc.Plan, [1], torch.ones(2))
SOME = {  # bad values by the argument's name, with a word that each message must hold besides the name
    "model": (NO_MODEL, ""),
    "calib_prompts": (NO_PROMPTS, "calib_prompts"),
    "prompts": (NO_PROMPTS, "prompts"),
    "speedup": ((*(v for v in NO_NUMBER if v is not None), 0, -2, 0.5), "speedup"),
    "quality": ((*(v for v in NO_NUMBER if v is not None), 0, -2), "quality"),
    "latency": ((*(v for v in NO_NUMBER if v is not None), 0, -2), "milliseconds"),
    "cache_bytes": ((*(v for v in NO_WHOLE if v is not None), 0), "cache_bytes"),
    "effort": (("max", "", 3, None, ["fast"], {"fast": 1}), "fast, normal, thorough"),
    "guard": (NO_FLAG, "guard"),
    "policy": (("teacup", "", 3, ["interval"], {"interval": 2}, True), "interval, deepcache"),
    "plan": (("plan.json", Path("plan.json"), 3, {"sites": []}, True), "dcc.Plan"),
    "profile": (("profile.safetensors", 3, True, {}), "dcc.Profile"),
    "sample": (NO_FUNCTION, "sample"),
    "data_range": ((*(v for v in NO_NUMBER if v is not None), 0, -1), "data_range"),
    "seed": (("x", *NO_WHOLE, 2**64), "seed"),
    "backend": (("gcc", "", 3, None, ["eager"], True), "inductor, eager"),
    "mode": (("fast", "", 3, None, ["default"]), "reduce-overhead"),
    "progress": (NO_FUNCTION, "progress"),
    "checkpoint": (tuple(v for v in NO_PATH if v is not None), "checkpoint"),
    "plans_or_policies": ((None, 3, "interval", [], {}, [3], ["teacup"], [("interval", {"order": 1})]), ""),
    "batch_size": ((*(v for v in NO_WHOLE if v is not None), 0), "batch_size"),
    "shown": (NO_WHOLE, "shown"),
    "path": (NO_PATH, "path"),
    "name": (("mmdut", "", 3, None, ["unet"]), "mmdit, unet"),
    "split": (("train", "", 3, None, ["calib"]), "calib, test"),
    "torch_dtype": (("float16", 3, torch.int8, np.float16, True), "torch_dtype"),
    "module": ((None, 3, "net"), "module"),
    "scheduler": ((3, None, True), "scheduler"),
    "dtype": ((3, True, ["float32"]), "dtype"),
    "site": (("outputs", 3, None, ["output"]), "output"),
    "stream": (("main.9", 3, ["main"]), "main"),
    "step": ((-1, 99, 1.5, True, "0", None), "step"),
    "anchors": ((3, None, [-1], [99], [0.5], ["0"]), ""),
    "coefficients": ((3, None, ["a"], [NAN], [1.0]), ""),
}
PIPELINE = {  # bad values of the pipelines' own arguments, by name
    "num_inference_steps": (0, -1, 2.5, "4", True, NAN),
    "height": (0, "64", True),
    "guidance_scale": ("3", True, NAN, math.inf),
    "negative_prompt": (3, True),
    "prompt": ("a red circle", ["a red circle"]),
    "prompt_embeds": (torch.ones(1, 16, 8),),
    "generator": (torch.Generator(), [torch.Generator()]),
    "latents": (torch.ones(1, 4, 8, 8), torch.ones(3, 4, 8, 8)),
    "num_images_per_prompt": (2, 0, True, "1"),
    "output_type": ("png", 3, True, ["pil"]),
    "return_dict": ("no", 3),
    "callback_on_step_end": (3, "print"),
    "heigth": (64,),
    "num_inference_step": (4,),
    "kwargs": ({},),
}


class Untouched(nn.Module):
    """Stands for the user's model: fails the test where it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("work was begun before the arguments were checked")


def never(net: Any, prompt: Any) -> Any:
    raise AssertionError("work was begun before the arguments were checked")


@pytest.fixture(scope="module")
def profile() -> dcc.Profile:
    return dcc.calibrate(Net().eval(), [1.0], sample=sample)


@pytest.fixture(scope="module")
def compiled_net() -> nn.Module:
    return dcc.compile(Net().eval(), [1.0], sample=sample, policy="interval", interval=2, backend="eager")


def functions(profile: dcc.Profile, net: nn.Module) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Every public function, with arguments that are good; that one is tried at a time means the others are these."""
    model = Untouched().eval()
    prompts = [1.0, 2.0, 3.0, 4.0]
    runs = {"model": model, "sample": never}
    error = {"site": "output", "step": 2, "anchors": [0, 1], "coefficients": [1.0, 2.0], "stream": None}
    plan = dcc.compiled(net).plan
    return {
        "compile": (dcc.compile, runs | {"calib_prompts": prompts}),
        "plan": (dcc.plan, runs | {"prompts": prompts}),
        "sites": (dcc.sites, runs | {"prompts": prompts}),
        "calibrate": (dcc.calibrate, runs | {"prompts": prompts}),
        "evaluate": (dcc.evaluate, runs | {"plans_or_policies": ["interval"], "prompts": prompts}),
        "restore": (dcc.restore, {"model": model}),
        "compiled": (dcc.compiled, {"model": model}),
        "summary": (dcc.summary, {"model": model}),
        "disabled": (entered(dcc.disabled), {"model": model}),
        "Plan.load": (dcc.Plan.load, {"path": "plan.json"}),
        "Plan.save": (plan.save, {"path": "plan.json"}),
        "Profile.load": (dcc.Profile.load, {"path": "profile.safetensors"}),
        "Profile.save": (profile.save, {"path": "profile.safetensors"}),
        "Profile.plot": (profile.plot, {"path": "profile.png"}),
        "Profile.cost": (profile.cost, {"site": "output"}),
        "Profile.matrix": (profile.matrix, {"site": "output", "stream": None}),
        "Profile.similarity": (profile.similarity, {"site": "output", "stream": None}),
        "Profile.norms": (profile.norms, {"site": "output", "stream": None}),
        "Profile.change": (profile.change, {"site": "output", "stream": None}),
        "Profile.error": (profile.error, error),
        "Profile.check": (profile.check, {"module": net, "scheduler": "sample", "dtype": "float32"}),
        "demo.load": (dcc.demo.load, {"name": "mmdit"}),
        "demo.path": (dcc.demo.path, {"name": "mmdit"}),
        "demo.settings": (dcc.demo.settings, {"name": "mmdit"}),
        "demo.prompts": (dcc.demo.prompts, {"split": "calib"}),
        "demo.names": (dcc.demo.names, {}),
    }


def entered(context: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the signature of a context manager that enters it."""

    def enter(*args: Any, **kwargs: Any) -> None:
        with context(*args, **kwargs):
            pass

    enter.__signature__ = inspect.signature(context)  # type: ignore[attr-defined]
    return enter


INNER = (
    "Plan.anchor_steps",
    "Plan.form",
    "Plan.parts",
    "Plan.weights",
)  # they index, as tuples do


def public() -> Iterator[str]:
    """The names of all public functions of dcc, and of the methods of its public classes that take arguments."""
    for name in dcc.__all__:
        value = getattr(dcc, name)
        if inspect.isfunction(value):
            yield name
    for cls in (dcc.Plan, dcc.Profile):
        for name, value in inspect.getmembers(cls):
            if name.startswith("_") or not (inspect.isfunction(value) or inspect.ismethod(value)):
                continue
            if len(inspect.signature(value).parameters) > inspect.isfunction(value):
                yield f"{cls.__name__}.{name}"
    for name, value in vars(dcc.demo).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            yield f"demo.{name}"


def bad_values(function: Callable[..., Any]) -> Iterator[tuple[str, Any, str]]:
    """For every argument of a function: its name, a bad value and a word of the message."""
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        assert name in SOME, f"{name}: give bad values of this argument"
        values, word = SOME[name]
        yield from ((name, value, word) for value in values if not (value is None and parameter.default is None))


def test_the_table_holds_every_public_function(profile: dcc.Profile, compiled_net: nn.Module):
    assert set(public()) - set(INNER) == set(functions(profile, compiled_net))


def test_bad_arguments_are_refused_before_any_work(
    profile: dcc.Profile, compiled_net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    tried = 0
    for label, (function, good) in functions(profile, compiled_net).items():
        for name, value, word in bad_values(function):
            said = refusal(function, good | {name: value}, f"{label}({name}={value!r:.60})")
            assert word in said, f"{label}({name}={value!r}): {said}"
            tried += 1
    assert tried > 350
    assert list(tmp_path.iterdir()) == []


def refusal(function: Callable[..., Any], given: dict[str, Any], where: str) -> str:
    """The message of the DccError that a call raises; anything else fails the test."""
    try:
        function(**given)
    except DccError as error:
        assert len(str(error)) > 20, where
        return str(error)
    except (Exception, AssertionError) as error:
        raise AssertionError(f"{where} raises {type(error).__name__}: {error}") from error
    raise AssertionError(f"{where} is taken")


@pytest.fixture(scope="module", params=["mmdit", "unet"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return dcc.demo.load(request.param)


def with_pipeline(pipe: Any) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    prompts = ["a red circle"] * 4
    return {
        "compile": (dcc.compile, {"model": pipe, "calib_prompts": prompts}),
        "compile by a policy": (dcc.compile, {"model": pipe, "calib_prompts": prompts, "policy": "interval"}),
        "plan": (dcc.plan, {"model": pipe, "prompts": prompts}),
        "sites": (dcc.sites, {"model": pipe, "prompts": prompts}),
        "calibrate": (dcc.calibrate, {"model": pipe, "prompts": prompts}),
        "evaluate": (dcc.evaluate, {"model": pipe, "plans_or_policies": ["interval"], "prompts": prompts}),
    }


def test_arguments_of_the_pipeline_are_refused_before_any_work(pipe: Any, monkeypatch: pytest.MonkeyPatch):
    def run(*args: Any) -> None:
        raise AssertionError("work was begun before the arguments were checked")

    monkeypatch.setattr(PipelineTarget, "_run", run)
    for label, (function, good) in with_pipeline(pipe).items():
        for name, values in PIPELINE.items():
            for value in values:
                said = refusal(function, good | {name: value}, f"{label}({name}={value!r:.60})")
                assert name in said
        for typo, meant in (("heigth", "height"), ("num_inference_step", "num_inference_steps")):
            assert f"did you mean {meant!r}?" in refusal(function, good | {typo: 4}, typo)
        for prompts in (["a", 3], [None], [b"a"], [torch.ones(2)]):
            name = "calib_prompts" if "calib_prompts" in good else "prompts"
            assert name in refusal(function, good | {name: prompts}, f"{label}({name}={prompts})")


def test_a_typo_of_a_policy_s_parameter_names_the_right_one(pipe: Any):
    with pytest.raises(DccError, match=r"'intervall' \(did you mean 'interval'\?\)"):
        dcc.compile(pipe, ["a red circle"], policy="interval", intervall=2)
    with pytest.raises(DccError, match=r"entry mine.*'intervall' \(did you mean 'interval'\?\)"):
        dcc.evaluate(pipe, {"mine": ("interval", {"intervall": 2})}, ["a red circle"])
    with pytest.raises(DccError, match=r"'spedup' \(did you mean 'speedup'\?\)"):
        dcc.compile(pipe, ["a red circle"] * 4, spedup=2)
    with pytest.raises(DccError, match=r"'taylorser'.*did you mean 'taylorseer'\?"):
        dcc.compile(pipe, ["a red circle"], policy="taylorser")


def test_what_the_pipeline_itself_refuses_is_said_with_its_arguments():
    unet = dcc.demo.load("unet")
    for function, good in with_pipeline(unet).values():
        with pytest.raises(
            DccError, match=r"Pipeline does not run on 'a red circle' with .*timesteps=list \[9, 1\].*Only one"
        ):
            function(**good, timesteps=[9, 1], sigmas=[1.0, 0.5])
