"""Runs candidate plans on real prompts and compares their final samples with the uncached ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dcc.discover.subject import Subject
from dcc.errors import PromptError
from dcc.measure.finite import all_finite, not_finite
from dcc.plans.predictors import Predictor
from dcc.quality import psnr
from dcc.record.seam import Handler
from dcc.record.target import Samples, Target, installed
from dcc.search.fit import Fit, FitOptions, OutputRunner, Sampler, find_sampler
from dcc.search.trace import Layout, Trace, Tracer, coordinates

IDENTICAL = 120.0  # dB; stands for an infinite PSNR, so that means stay finite
FAILED = -120.0  # dB; stands for a sample that is not finite, so that nothing is worse
HOPELESS = 1.0  # dB below the best candidate on the same prompts, at which the rest of the prompts is not run


@dataclass(frozen=True)
class Candidate:
    """A step mask for one site and how its forecasts are made; compares and hashes by value."""

    site: str
    rule: Predictor | FitOptions
    mask: tuple[int, ...]

    @property
    def full(self) -> int:
        """Number of computed steps."""
        return sum(self.mask)

    @property
    def anchors(self) -> int:
        """J: the largest number of anchors that a forecast reads."""
        return min(self.rule.anchors, self.full)

    def __str__(self) -> str:
        rule = self.rule
        text = f"fitted {rule.anchors}, ridge {rule.ridge:g}" if isinstance(rule, FitOptions) else str(rule)
        return f"{self.site}, {text}"

    @property
    def fitted(self) -> bool:
        """Whether coefficients come from a fit and not from the steps alone."""
        return isinstance(self.rule, FitOptions)

    def polynomial(self) -> dict[int, list[float]]:
        """Coefficients that follow from the steps alone, by forecast step."""
        assert isinstance(self.rule, Predictor)
        result = {}
        for step, full in enumerate(self.mask):
            if not full:
                result[step] = self.rule.coefficients(step, [s for s in range(step - 1, -1, -1) if self.mask[s]])
        return result


@dataclass(frozen=True)
class Outcome:
    """Quality of a candidate: PSNR (dB) of each prompt that was run, and the coefficients used at the end."""

    psnr: tuple[float, ...]
    coefficients: dict[int, list[float]]
    complete: bool = True

    @property
    def mean(self) -> float:
        """Mean PSNR in dB."""
        return sum(self.psnr) / len(self.psnr)

    @property
    def failed(self) -> int | None:
        """The first prompt, by its place, whose cached sample was not finite; None where all are."""
        return next((index for index, value in enumerate(self.psnr) if value == FAILED), None)


@dataclass
class Batch:
    """A batch of prompts, its uncached samples, and its trace where forecasts are to be fitted."""

    prompts: list[Any]
    seeds: list[int]
    reference: Samples
    trace: Trace | None


@dataclass
class ClosedLoop:
    """The uncached runs of some prompts, and everything that cached runs of them need.

    `net(candidate, coefficients)` makes a denoiser for a candidate on any site; those on the raw output need none.
    """

    subject: Subject
    net: Callable[[Candidate, dict[int, list[float]]], Handler]
    batches: list[Batch]
    data_range: float
    sampler: Sampler | None = None
    names: Sequence[str] = ()  # what the caller's prompts are called, such as "prompt 3"
    known: dict[Candidate, Outcome] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the raw output's forecasts can be fitted: the sampler is linear in what the denoiser returns."""
        return self.sampler is not None and self.sampler.linear

    def score(self, candidate: Candidate, best: Outcome | None = None) -> Outcome:
        """Runs a candidate on all prompts, fitting where it asks for it; stops early where `best` is out of reach."""
        if candidate in self.known:
            return self.known[candidate]
        coefficients = {} if candidate.fitted else candidate.polynomial()
        fit = None
        if isinstance(candidate.rule, FitOptions):
            assert self.sampler is not None
            fit = Fit(candidate.mask, candidate.rule, self.sampler)
        values: list[float] = []
        for batch in self.batches:
            values += self.run(candidate, coefficients, batch, fit)
            if best and len(values) < len(best.psnr) and _gap(values, best.psnr) > HOPELESS:
                return Outcome(tuple(values), coefficients, complete=False)
        self.known[candidate] = Outcome(tuple(values), coefficients)
        return self.known[candidate]

    def check(self, candidate: Candidate, coefficients: dict[int, list[float]]) -> tuple[Outcome, Samples]:
        """PSNR and samples of a candidate whose coefficients are settled."""
        values, parts = [], []
        for batch in self.batches:
            parts.append(self._samples(candidate, coefficients, batch, None))
            values += self.psnr(parts[-1], batch)
        return Outcome(tuple(values), coefficients), Samples.concatenate(parts)

    def run(
        self, candidate: Candidate, coefficients: dict[int, list[float]], batch: Batch, fit: Fit | None
    ) -> list[float]:
        """PSNR of each prompt of one batch; with `fit`, `coefficients` are filled in while it runs."""
        return self.psnr(self._samples(candidate, coefficients, batch, fit), batch)

    def _samples(
        self, candidate: Candidate, coefficients: dict[int, list[float]], batch: Batch, fit: Fit | None
    ) -> Samples:
        layout = Layout(self.subject.run, len(batch.prompts))
        if candidate.site == "output" and layout.calls:
            net = OutputRunner(self.subject.module, self.subject.run, layout, candidate.mask, candidate.anchors)
            net.begin(coefficients, fit, batch.trace)
        else:
            net = self.net(candidate, coefficients)
        return self.generate(net, batch)

    def generate(self, net: Handler, batch: Batch) -> Samples:
        """The samples of a batch with `net` on the denoiser."""
        return _with(self.subject.target, net, batch.prompts, batch.seeds)

    def psnr(self, samples: Samples, batch: Batch) -> list[float]:
        """PSNR in dB of each sample of a batch to the uncached one, from FAILED to IDENTICAL."""
        n = len(batch.prompts)
        ours, theirs = (s.images.reshape(n, 1, 1, -1) for s in (samples, batch.reference))
        values = psnr(ours, theirs, self.data_range)
        return [FAILED if math.isnan(value) else max(FAILED, min(value, IDENTICAL)) for value in values]


def prepare(
    subject: Subject,
    net: Callable[[Candidate, dict[int, list[float]]], Handler],
    prompts: Sequence[Any],
    seeds: Sequence[int],
    *,
    batch_size: int,
    data_range: float | None = None,
    traced: bool = True,
    names: Sequence[str] = (),
    progress: Callable[[str], None],
) -> ClosedLoop:
    """Runs all prompts uncached, `batch_size` at a time; `data_range` None is 1 for pixels, else the samples' range.

    `names` are what the caller's prompts are called, if not by their place. Raises PromptError, naming prompt and step,
    where a run is not finite.
    """
    names = names or [f"prompt {index + 1}" for index in range(len(prompts))]
    batches: list[Batch] = []
    while (done := sum(len(batch.prompts) for batch in batches)) < len(prompts):
        chunk = slice(done, done + batch_size)
        progress(f"uncached runs: prompt {done + 1} of {len(prompts)}")
        try:
            batches.append(_uncached(subject, list(prompts[chunk]), list(seeds[chunk]), traced))
        except (TypeError, ValueError, RuntimeError):
            if batch_size == 1:
                raise
            batch_size = 1  # a loop for one image at a time, or arguments that are per image
            continue
        for index in _broken(batches[-1])[:1]:
            raise PromptError(not_finite(subject, prompts[done + index], seeds[done + index], names[done + index]))
    if data_range is None:
        data_range = subject.target.data_range or _range([batch.reference.images for batch in batches])
    traces = [batch.trace for batch in batches if batch.trace is not None]
    sampler = find_sampler(traces) if len(traces) == len(batches) else None
    return ClosedLoop(subject, net, batches, data_range, sampler, names)


def _broken(batch: Batch) -> list[int]:
    """The prompts of a batch, by their place, whose uncached run is not finite."""
    samples = batch.reference.images.reshape(len(batch.prompts), -1)
    outputs = batch.trace.outputs if batch.trace is not None else []
    return [
        index
        for index, sample in enumerate(samples)
        if not all_finite(sample, *(value[:, index] for value in outputs if index < value.shape[1]))
    ]


def _uncached(subject: Subject, prompts: list[Any], seeds: list[int], traced: bool) -> Batch:
    """One batch of uncached runs, with its trace if that is wanted and the run is laid out evenly over its steps."""
    layout = Layout(subject.run, len(prompts))
    if not (traced and layout.calls and layout.sample_name):
        return Batch(prompts, seeds, _with(subject.target, None, prompts, seeds), None)
    tracer = Tracer(subject.module, subject.run, layout)
    samples = _with(subject.target, tracer, prompts, seeds)
    tracer.trace.final = _final(samples.state, tracer.trace)
    return Batch(prompts, seeds, samples, tracer.trace)


def _range(samples: Sequence[Tensor]) -> float:
    """Largest minus smallest value; 1 where they are all the same."""
    return max(float(s.max()) for s in samples) - min(float(s.min()) for s in samples) or 1.0


def _final(state: Tensor | None, trace: Trace) -> Tensor | None:
    """The sampler's last state at the coordinates that the trace keeps, None where it is not shown."""
    if state is None or not trace.samples:
        return None
    n, kept = trace.samples[0].shape
    flat = state.reshape(len(state), -1)
    if len(state) != n or len(coordinates(flat.shape[1])) != kept:
        return None
    return flat[:, coordinates(flat.shape[1])].to(trace.samples[0].device)


def _with(target: Target, net: Handler | None, prompts: list[Any], seeds: list[int]) -> Samples:
    """The final samples with a handler, or none, on the denoiser."""
    with installed(target, net), torch.no_grad():
        return target.generate(prompts, seeds)


def _gap(values: Sequence[float], best: Sequence[float]) -> float:
    """How far, in dB, `values` are below the best candidate on the same prompts."""
    return sum(b - v for v, b in zip(values, best, strict=False)) / len(values)
