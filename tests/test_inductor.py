"""The lowered path: one region per call, no Dynamo, nothing compiled twice, numbers checked, fallbacks recorded."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
import torch._inductor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import dcc
from dcc.capture.export import capture
from dcc.lower.program import Programs, lower, start_inductor
from dcc.passes.text import text
from dcc.record.call import bind
from dcc.variants.observe import Observer, Options
from dcc.variants.variant import Variant

from .denoisers import CASES
from .nets import apart

STEPS = 6
FLUX = next(case for case in CASES if case.name == "flux")


def sample(net: torch.nn.Module, prompt: int, seed: int = 0) -> torch.Tensor:
    """One run: the output is fed back into the sample."""
    kwargs = FLUX.inputs(batch=2, seed=prompt)
    kwargs["hidden_states"] = torch.randn(kwargs["hidden_states"].shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for step in range(STEPS):
            kwargs["timestep"] = torch.full((2,), 1.0 - step / STEPS)
            kwargs["hidden_states"] = kwargs["hidden_states"] - net(**kwargs)[0] / STEPS
    return kwargs["hidden_states"]


@pytest.fixture(scope="module")
def compiled() -> tuple[dcc.CompiledDenoiser, list[int], torch.nn.Module]:
    """A denoiser compiled with Inductor, and the number of nodes of every graph that was handed to Inductor."""
    handed, original = [], torch._inductor.compile

    def counting(graph_module: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        handed.append(len(graph_module.graph.nodes))
        return original(graph_module, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._inductor, "compile", counting)
        net = FLUX.build()
        yield apart(net, [0], sample=sample, policy="taylorseer", interval=3, first=2), handed, net


@pytest.mark.slow
def test_inductor_starts_beside_other_work() -> None:
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    valid_vec_isa_list.cache_clear()
    start_inductor.cache_clear()
    before = os.getpriority(os.PRIO_PROCESS, 0)
    thread = start_inductor()
    assert start_inductor() is thread
    thread.join()
    assert valid_vec_isa_list.cache_info().currsize == 1  # it is found out
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_the_eager_backend_does_not_start_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr("dcc.compiler.start_inductor", lambda: started.append(1))
    monkeypatch.setattr("dcc.lower.program._inductor", lambda graph_module, *_: graph_module)
    for backend in ("eager", "inductor"):
        dcc.compile(FLUX.build(), [0], sample=sample, policy="interval", interval=2, backend=backend)
        assert len(started) == (backend == "inductor")


@pytest.mark.slow
def test_every_variant_is_one_region_and_nothing_is_compiled_twice(compiled: Any) -> None:
    net, handed, _ = compiled
    assert len(handed) == len(net.plan.rows) == 2
    full, forecast = (len(variant.graph_module.graph.nodes) for variant in net.families[0].variants.values())
    assert forecast < full / 4  # what is left of the graph
    counters.clear()
    for prompt, seed in ((0, 0), (0, 1), (5, 2), (7, 3)):
        sample(net, prompt, seed)
    assert len(handed) == 2  # second image, another prompt, another seed: nothing was lowered again
    assert sum(counters["graph_break"].values()) == 0
    assert sum(counters["frames"].values()) == 0  # Dynamo is not on the path at all
    summary = net.summary()
    assert (summary.programs, summary.captures, summary.problems) == (2, 1, ())
    assert summary.forecast == 4 * 3 and summary.computed == 4 * 3


@pytest.mark.slow
def test_lowered_numbers_agree_with_the_eager_graphs(compiled: Any) -> None:
    net, _, original = compiled
    eager = apart(original, [0], sample=sample, plan=net.plan, backend="eager")
    assert torch.allclose(sample(net, 3), sample(eager, 3), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(sample(net, 3), sample(original, 3), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_new_shape_is_lowered_once_and_not_captured_again(compiled: Any) -> None:
    net, handed, _ = compiled
    before = len(handed)
    kwargs = FLUX.inputs(batch=3, seed=1)
    with torch.no_grad():
        for _ in range(2):
            net(**{**kwargs, "timestep": torch.ones(3)})
    assert len(handed) == before + 1
    assert net.summary().captures == 1


def test_each_variant_is_one_graph_for_dynamo_too() -> None:
    net = apart(FLUX.build(), [0], sample=sample, policy="interval", interval=2, backend="eager")
    seen: list[tuple[Variant, list[torch.Tensor]]] = []
    program = Programs.of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "of", lambda s, v, c, i: seen.append((v, list(i))) or program(s, v, c, i))
        sample(net, 0)
    for variant, inputs in {variant.name: (variant, inputs) for variant, inputs in seen}.values():
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        with torch.no_grad():
            torch.compile(variant.graph_module, backend=counter, fullgraph=True, dynamic=False)(*inputs)
        assert counter.frame_count == 1
    assert len({variant.name for variant, _ in seen}) == 2


def test_a_prompt_that_is_no_dense_tensor_is_still_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor, "compile", lambda graph_module, *_: graph_module)
    prompt = FLUX.inputs(batch=2)["encoder_hidden_states"].mT.contiguous().mT

    def run(net: torch.nn.Module, _: int) -> None:
        kwargs = FLUX.inputs(batch=2) | {"encoder_hidden_states": prompt}
        for step in range(STEPS):
            kwargs["timestep"] = torch.full((2,), 1.0 - step / STEPS)
            kwargs["hidden_states"] = kwargs["hidden_states"] - net(**kwargs)[0] / STEPS

    net = apart(FLUX.build(), [0], sample=run, policy="interval", interval=3)
    assert not prompt.is_contiguous()
    run(net, 0)
    summary = net.summary()
    assert (summary.computed, summary.forecast, summary.missed, summary.sessions) == (2, 4, 0, 1)


class Square(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x


def square() -> tuple[Variant, list[torch.Tensor]]:
    x = torch.randn(2, 5)
    module = Square()
    captured = capture(module, bind(module, (x,), {}, frozenset()))
    return Variant("square", captured.graph_module, 1), [x]


def test_a_wrong_lowering_never_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    variant, inputs = square()
    monkeypatch.setattr(torch._inductor, "compile", lambda *_: lambda x: (x * x * 1.01,))
    program = lower(variant, inputs, "inductor")
    for _ in range(2):
        assert torch.equal(program(inputs)[0], inputs[0] * inputs[0])
    assert program.backend == "eager" and "differs from eager by 1.0e-02" in program.problem


def test_a_failing_lowering_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no compiler here")

    variant, inputs = square()
    monkeypatch.setattr(torch._inductor, "compile", fail)
    program = lower(variant, inputs, "inductor")
    assert torch.equal(program(inputs)[0], inputs[0] * inputs[0])
    assert program.backend == "eager" and "no compiler here" in program.problem


def test_a_wrong_outlining_is_lowered_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcc.lower.program.bodies", lambda graph_module: 1)
    answers = iter([1.01, 1.0])
    factors = []

    def lowering(*_: Any) -> Any:
        factors.append(next(answers))
        return lambda x, factor=factors[-1]: (x * x * factor,)

    variant, inputs = square()
    monkeypatch.setattr(torch._inductor, "compile", lowering)
    program = lower(variant, inputs, "inductor")
    assert program.backend == "inductor" and factors == [1.01, 1.0] and program.bodies == 0
    assert program.problem.startswith("is lowered whole: with outlined blocks: output 0 of the lowered variant differs")
    assert torch.equal(program(inputs)[0], inputs[0] * inputs[0])


def test_an_unknown_mode_lists_the_modes() -> None:
    variant, inputs = square()
    with pytest.raises(dcc.errors.LoweringError, match=r"'fast'; there are: default, reduce-overhead, max-autotune"):
        lower(variant, inputs, "inductor", "fast")


class Blocks(torch.nn.Module):
    """Three blocks that are alike."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [torch.nn.Sequential(*(torch.nn.Linear(4, 4), torch.nn.GELU()) * 5) for _ in range(3)]
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@torch.no_grad()
def test_the_dump_shows_the_graph_that_goes_to_inductor(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are numbers in it, and blocks that are alike are calls of one body."""
    handed = []

    def lowering(graph_module: torch.fx.GraphModule, *_: Any) -> Any:
        handed.append(text(graph_module))
        return variant.graph_module

    module, x = Blocks().eval(), torch.randn(2, 4)
    captured = capture(module, bind(module, (x,), {}, frozenset()))
    variant = Variant("row0", captured.graph_module, 1)
    inputs = captured.inputs_of(bind(module, (torch.randn(3, 4),), {}, frozenset()))
    monkeypatch.setattr(torch._inductor, "compile", lowering)
    program = lower(variant, inputs, "inductor", observer=Observer(Options(dump=tmp_path)))
    assert program.problem is None and program.bodies == 1
    dumps = sorted(tmp_path.iterdir())
    assert [path.name for path in dumps] == ["row0_lowered_00_specialize.txt", "row0_lowered_01_outline_blocks.txt"]
    (lowered,) = handed
    dumped = dumps[-1].read_text()
    plain = [re.sub(r"  # .*", "", each) for each in (dumped, lowered)]  # Inductor makes its own shapes
    assert plain[0] == plain[1]
    assert dumped.count("invoke_subgraph") == 3 and "f32[3, 4]" in dumped and "f32[s" not in dumped
