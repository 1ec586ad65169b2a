"""The bytes that summary() and the plan report, against what torch's memory profiler sees being held."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from .denoisers import CASES
from .nets import apart

pytestmark = pytest.mark.usefixtures("graphs")

STEPS = 6
CASE = {case.name: case for case in CASES}


def sample(name):
    def run(net, prompt, steps=STEPS):
        draw = CASE[name].inputs
        kwargs = draw(batch=2, seed=prompt)
        moving = next(key for key in ("sample", "hidden_states") if key in kwargs)
        with torch.no_grad():
            for step in range(steps):
                kwargs["timestep"] = draw(batch=2, timestep=900.0 - 100.0 * step)["timestep"]
                net(**kwargs | {moving: kwargs[moving] * (1.0 - 0.1 * step)})

    return run


def held_after(net, name, steps):
    """Bytes that are allocated in the first `steps` steps of a run and not freed."""
    run = sample(name)
    run(net, 0)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(net, 1, steps)
        gc.collect()
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("name", ["flux", "unet-sd"])
@pytest.mark.parametrize("site", ["default", "blocks"])
def test_the_bytes_reported_are_those_held(name, site):
    module, run = CASE[name].build(), sample(name)
    plain = apart(module, [0], sample=run, policy="interval", interval=1, backend="eager")
    base = held_after(plain, name, STEPS - 1)
    where = {} if site == "default" else {"site": site}
    net = apart(module, [0], sample=run, policy="taylorseer", interval=3, order=1, backend="eager", **where)
    held = held_after(net, name, STEPS - 1) - base
    assert held > 0
    assert net.summary().cache_bytes == pytest.approx(held, rel=0.05)
    assert net.plan.cache_bytes == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("name", ["flux", "unet-sd"])
def test_default_plans_keep_at_most_four_tensors_a_stream(name):
    """Of the size of a residual stream: the site's ports, each with the plan's anchors."""
    net = apart(CASE[name].build(), [0], sample=sample(name), policy="taylorseer", interval=3, backend="eager")
    (sites,) = net.families[0].selectors
    assert all(len(site.ports) == 1 for site in sites) and net.plan.anchors <= 4
