"""What every compilation, plan and calibration begins with: a recorded run, the captured denoiser, its sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dcc.capture.captured import Captured
from dcc.capture.export import capture
from dcc.discover.sites import Sites, find_sites
from dcc.record.call import Call
from dcc.record.recorder import Recording
from dcc.record.target import Target, recording


def examine(target: Target, prompts: Sequence[Any], say: Callable[[str], None]) -> tuple[Recording, Captured, Sites]:
    """What every plan and calibration begins with: a recorded run, the captured denoiser, its sites."""
    # noise levels, streams, which inputs move; and the inputs of a batch of two
    say("recording one run")
    run, wide = record(target, prompts)

    # one functional ATen graph whose weights are inputs
    say("capturing the denoiser")
    captured = capture(target.module, wide, run.first)
    captured.learn(run.varying, run.keys, run.guided)

    # with what each value costs and saves
    return run, captured, find_sites(captured, run.first)


def record(target: Target, prompts: Sequence[Any]) -> tuple[Recording, Call]:
    """One whole run of the first prompt, and the first call of a batch of two, which keeps the batch symbolic.

    Where the loop takes no batch, the two are the same, and another batch size will be captured when it comes.
    """
    with recording(target) as recorder:
        target.sample(prompts[:1])
    run = recorder.result()
    if all(t.dim() == 0 or t.shape[0] > 1 for t in run.first.tensors):
        return run, run.first
    try:
        with recording(target, only_first=True) as recorder:
            target.sample([prompts[0], prompts[-1]])
    except (TypeError, ValueError, RuntimeError):  # a loop for one image at a time, or arguments that are per image
        return run, run.first
    wide = recorder.first
    return run, wide if wide is not None and wide.signature == run.first.signature else run.first
