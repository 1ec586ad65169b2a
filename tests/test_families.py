"""An all-compute plan is the original model, bit for bit, on many families of denoisers, with no adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import dcc
from dcc.capture.export import _CAPTURES, capture
from dcc.discover.sites import find_sites

from .denoisers import CASES, Case

pytestmark = pytest.mark.usefixtures("graphs")

FAMILIES = (
    "flux sd3 qwenimage auraflow chroma dit pixart sana hunyuandit unet-sdxl unet2d stable-cascade unet-motion wan "
    "hunyuanvideo ltx cogvideox stable-audio audioldm2 acestep"
).split()
BLOCKLESS = {"unet2d"}
TIMESTEPS = (900.0, 600.0, 300.0)


def loop(case: Case, outputs: list[torch.Tensor]):
    """A sampling loop: the first argument moves from step to step, the prompt stays."""

    def sample(net: nn.Module, prompt: Any) -> None:
        outputs.clear()
        prompts = case.inputs(batch=2, seed=prompt)
        for index, timestep in enumerate(TIMESTEPS):
            kwargs = {**case.inputs(batch=2, seed=prompt, timestep=timestep)}
            moving = next(iter(kwargs))
            same = [n for n in kwargs if all(map(_equal, _pairs(kwargs[n], prompts[n]))) and n != moving]
            kwargs.update({name: prompts[name] for name in same})
            kwargs[moving] = pytree.tree_map(lambda x, k=index: x * (1.0 + 0.1 * k), kwargs[moving])
            with torch.no_grad():
                outputs.extend(pytree.tree_leaves(net(**kwargs)))

    return sample


def _pairs(a: Any, b: Any) -> list[tuple[Any, Any]]:
    return list(zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))


def _equal(pair: tuple[Any, Any]) -> bool:
    a, b = pair
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("case", [case for case in CASES if case.name in FAMILIES], ids=str)
def test_all_compute_is_the_original_bit_for_bit(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DCC_CACHE_DIR", str(tmp_path))
    if case.warns:
        warnings.filterwarnings("ignore", message=case.warns)
    net, outputs = case.build(), []
    sample = loop(case, outputs)
    sample(net, 7)
    expected = list(outputs)
    compiled = dcc.compile(net, [0], sample=sample, policy="interval", interval=1, backend="eager")
    sample(compiled, 7)
    assert len(outputs) == len(expected) > 2
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert not torch.equal(expected[0], expected[-1])
    assert compiled is net
    compiled = dcc.compiled(net)
    summary = compiled.summary()
    assert summary.captures == 1 and summary.computed == len(TIMESTEPS)
    assert [p for p in summary.problems if "saved" not in p] == []
    sites = dcc.sites(compiled)
    names = [site.name for site in sites]
    assert "output" in names
    captured = compiled.families[0].captured
    assert captured.origin == "exported" and sites.call.signature == captured.call.signature
    del _CAPTURES[net]  # as another process would find it
    stored = capture(net, captured.call)
    assert stored.origin == "read from disk" and stored is not captured
    assert list(find_sites(stored, sites.call, sites.run)) == list(sites)
    assert any(name.startswith(case.blocks) for name in names) or case.name in BLOCKLESS
