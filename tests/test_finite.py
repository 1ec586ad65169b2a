"""A prompt whose run is not finite is named with its step, wherever runs are compared; no plan is scored on it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcc
from dcc.errors import BudgetError, PipelineError, ProfileError, PromptError
from dcc.measure.values import recorded_values
from dcc.record.target import Samples
from dcc.search.closed_loop import FAILED, IDENTICAL, Batch, Candidate, ClosedLoop, Outcome
from dcc.search.solver import Goal, solve

from .test_solver import Loop, problem

STEPS = 6
BAD = -3.0  # the prompt whose run goes wrong, at step 4 of 6
PROMPTS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


class Denoiser(nn.Module):
    """Two layers; what it returns for BAD is NaN below a noise level, or infinite."""

    def __init__(self, value: float = math.nan) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.value = nn.Linear(4, 8), nn.Linear(8, 4), value

    def forward(self, x: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        out = self.last(torch.tanh(self.first(x + prompt))) * time[:, None]
        return torch.where((prompt == BAD) & (time[:, None] < 0.55), self.value, out)


def sample(net: Any, prompt: float) -> Tensor:
    x = torch.randn(1, 4)
    condition = torch.full((1, 1), prompt)
    for step in range(STEPS):
        x = x - net(x, torch.full((1,), 1 - step / STEPS), condition) / STEPS
    return x


def hidden(net: Any, prompt: float) -> Tensor:
    """A loop whose final sample shows nothing of it."""
    return sample(net, prompt).nan_to_num(0.0, 0.0, 0.0)


def denoiser(value: float = math.nan) -> nn.Module:
    return Denoiser(value).eval().requires_grad_(False)


def with_bad(place: int) -> list[float]:
    return [*PROMPTS[:place], BAD, *PROMPTS[place + 1 :]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [1, 2, 5])  # one that is fitted to, and the two that are held back
def test_the_search_names_prompt_and_step(place: int, value: float):
    with pytest.raises(PromptError, match=rf"^prompt {place + 1} \(-3\.0\): its uncached run .* at step 4 of 6 on"):
        dcc.plan(denoiser(value), with_bad(place), quality=30, effort="fast", sample=sample, backend="eager")


def test_the_search_sees_what_the_final_sample_hides():
    with pytest.raises(PromptError, match=r"^prompt 2 \(-3\.0\).* at step 4 of 6 on"):
        dcc.plan(denoiser(), with_bad(1), speedup=2, effort="fast", sample=hidden, backend="eager")


def test_the_loop_itself_may_be_what_fails():
    def loop(net: Any, prompt: float) -> Tensor:
        return sample(net, abs(prompt)) / torch.tensor(0.0 if prompt == BAD else 1.0)

    with pytest.raises(PromptError, match=r"^prompt 3 \(-3\.0\).*all that the denoiser returns is finite"):
        dcc.plan(denoiser(), with_bad(2), speedup=2, effort="fast", sample=loop, backend="eager")


@pytest.mark.parametrize("loop", [sample, hidden])
def test_a_calibration_names_prompt_step_and_site(loop: Any):
    with pytest.raises(
        ProfileError, match=r"^prompt 2: site 'output' of stream '\w+' is NaN or inf.* from step 4 of 6"
    ):
        dcc.calibrate(denoiser(), with_bad(1), sample=loop)


def test_a_calibration_refuses_a_final_sample_that_is_not_finite():
    def loop(net: Any, prompt: float) -> Tensor:
        return sample(net, abs(prompt)) / torch.tensor(0.0 if prompt == BAD else 1.0)

    with pytest.raises(ProfileError, match=r"^prompt 2 \(-3\.0\).*all that the denoiser returns is finite"):
        dcc.calibrate(denoiser(), with_bad(1), sample=loop)


def test_a_comparison_names_prompt_and_step():
    with pytest.raises(PipelineError, match=r"^prompt 2 \(-3\.0\).* at step 4 of 6 on"):
        dcc.evaluate(denoiser(), ["interval"], with_bad(1), sample=sample, backend="eager")


def test_a_policy_that_reads_features_names_the_step():
    net = dcc.compile(denoiser(), [1.0], sample=sample, policy="interval", backend="eager")
    subject = dcc.compiled(net).subject
    dcc.restore(net)
    assert recorded_values(subject, "output", 2.0, 0).shape[0] == STEPS
    with pytest.raises(ProfileError, match=r"^prompt 1 \(-3\.0\): site 'output' .* from step 4 of 6 on"):
        recorded_values(subject, "output", BAD, 0)


class Diverging(Loop):
    """Every cached run of the second prompt diverges, but those of masks that compute the fourth step."""

    names = ("prompt 1", "prompt 4", "prompt 9")

    def score(self, candidate: Candidate, best: Outcome | None = None) -> Outcome:
        found = super().score(candidate, best)
        return found if candidate.mask[3] else Outcome((found.psnr[0], FAILED, found.psnr[2]), found.coefficients)


class Failing(Diverging):
    """Every cached run of the second prompt diverges."""

    def score(self, candidate: Candidate, best: Outcome | None = None) -> Outcome:
        return Outcome((30.0, FAILED, 30.0), super().score(candidate, best).coefficients)


def test_a_candidate_that_diverges_is_not_chosen():
    plan = solve(problem(fitting=Diverging(), held_back=Diverging()), Goal(speedup=4.0), "normal", 0, print)
    assert plan.steps_mask[3] == 1 and plan.measured["psnr_worst"] > 0


@pytest.mark.parametrize("changes", [{"fitting": Failing(), "held_back": Failing()}, {"held_back": Failing()}])
def test_a_plan_that_diverges_on_a_prompt_is_not_accepted(changes: dict[str, Any]):
    with pytest.raises(BudgetError, match=r"5 of 20 steps computed\) gives values that are not finite on prompt 4;"):
        solve(problem(**changes), Goal(speedup=4.0), "fast", 0, print)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_sample_that_is_not_finite_has_the_lowest_score(value: float):
    truth = torch.rand(3, 1, 4, 4)
    reference = Samples(truth, truth)
    own = truth.clone()
    own[1, 0, 2, 2] = value
    loop = ClosedLoop(None, None, [], 1.0)  # type: ignore[arg-type]  # what is asked of it here needs no denoiser
    batch = Batch([1, 2, 3], [0, 1, 2], reference, None)
    scores = loop.psnr(Samples(own, own), batch)
    assert scores == [IDENTICAL, FAILED, IDENTICAL]
    assert Outcome(tuple(scores), {}).failed == 1 and Outcome((30.0, IDENTICAL), {}).failed is None
