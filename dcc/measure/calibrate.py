"""Calibration: runs the prompts once through an instrumented graph and keeps how every site's values move.

The instrumented graph is the captured denoiser with small extra outputs (passes/insert_sketches.py); the pipeline runs
as ever. Every prompt is added to one Gram matrix per site and stream, so memory grows with neither prompts nor pixels.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dcc import arguments
from dcc.discover.sites import Sites
from dcc.discover.subject import Subject
from dcc.errors import ProfileError
from dcc.measure.finite import all_finite, not_finite
from dcc.measure.instrument import Instrument, Run
from dcc.measure.profile import Profile, SiteCost, check_tensor, dtype_of, read_costs
from dcc.passes.base import Port
from dcc.passes.timings import timings
from dcc.plans.fields import finite, whole
from dcc.record.fingerprint import weights_hash
from dcc.record.recorder import Recording
from dcc.record.target import Samples, Target, check_prompts, installed, is_pipeline, make_target
from dcc.tensor_file import read_tensors, write_tensors

MARK, VERSION = "dcc_calibration", 2  # mark and version of checkpoints
SUMS = ("gram", "moved", "size")
STATE = ("done", "streams", "seconds", "probes", "costs")  # of a checkpoint, beside what identifies the calibration
PROBE_BUDGET = 0.1  # whole runs spent on sensitivity, per prompt


def calibrate(
    model: Any,
    prompts: Sequence[Any],
    *,
    sample: Callable[[nn.Module, Any], Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    **pipeline_kwargs: Any,
) -> Profile:
    """Measures how the features of a pipeline's or module's denoiser move from step to step.

    Args:
        model: a DiffusionPipeline or an nn.Module, not compiled by dcc; it is left as it was.
        prompts: prompts like those to be served; run one after the other, prompt i with the noise of seed + i.
        sample: for a bare module: sample(net, prompt) runs one full sampling loop and returns the final sample.
        checkpoint: a file that is rewritten after every prompt, and resumed where it exists.
        seed: seed of the first prompt's noise.
        progress: called with one line before each stage and prompt.
        pipeline_kwargs: arguments of the pipeline's call (num_inference_steps, height, ...) as they will be served.

    Beyond the runs of the prompts themselves this takes one recorded run, the capture, the sketches, and probes of
    sensitivity that cost at most max(1, 0.1 * len(prompts)) runs.

    Raises a subclass of DccError for anything it refuses; ProfileError for a checkpoint of other arguments and for
    loops that cannot be calibrated.
    """
    say, seed = arguments.progress_of(progress), arguments.seed_of(seed)
    if checkpoint is not None:
        arguments.new_file("checkpoint", checkpoint, ProfileError)
    target = make_target(model, sample, pipeline_kwargs)
    prompts = check_prompts(prompts, is_pipeline(model))

    subject = Subject.of(target, prompts, say)
    return measure(subject, prompts, checkpoint=checkpoint, seed=seed, progress=say, settings=pipeline_kwargs)


def measure(
    subject: Subject,
    prompts: Sequence[Any],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None],
    settings: dict[str, Any],
) -> Profile:
    """`calibrate` for a denoiser that was recorded and captured already."""
    say, run, target, sites = progress, subject.run, subject.target, subject.sites
    instrument = Instrument(subject)
    names = instrument.site_names
    state = Accumulated(_identity(subject, names, prompts, seed, settings))
    if checkpoint is not None and os.path.exists(checkpoint):
        state.load(checkpoint, len(prompts))
        say(f"resuming after prompt {state.done} of {len(prompts)}")
    else:
        say("timing the nodes of one call")
        state.costs, state.seconds = measured_costs(run, sites, names)

    probes = probe_steps(len(run.levels), len(prompts))
    with installed(target, instrument.denoiser()):
        for index in range(state.done, len(prompts)):
            say(f"prompt {index + 1} of {len(prompts)}")
            own = _probed_with(index, probes, len(prompts))
            base = Run(keep_outputs=bool(own))
            samples = _generate(target, instrument, base, prompts[index], seed + index)
            state.add(base)
            if not all_finite(samples.images):
                raise ProfileError(not_finite(subject, prompts[index], seed + index, f"prompt {index + 1}"))
            for step in own:
                say(f"disturbing step {step + 1} of {len(run.levels)}")
                disturbed = Run(disturbed=step, seed=seed + index, outputs=base.outputs)
                moved = _generate(target, instrument, disturbed, prompts[index], seed + index).raw - samples.raw
                if not all_finite(moved):
                    raise ProfileError(
                        f"prompt {index + 1}: with a little noise in what the denoiser returns at step {step + 1} of "
                        f"{len(run.levels)} the final sample is NaN or infinite; leave it out, or check the dtype"
                    )
                state.probes.append((step, _ratio(moved, disturbed)))
            state.done = index + 1
            if checkpoint is not None:
                state.save(checkpoint)
    return state.profile(sites)


class Accumulated:
    """The sums of a calibration under way, which a checkpoint holds; a resumed one must have the same `identity`."""

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity = identity
        self.done = 0
        self.streams: list[str] = []
        self.costs: list[SiteCost] = []
        self.seconds = 0.0
        self.probes: list[tuple[int, float]] = []
        self.gram = self.moved = self.size = torch.empty(0, dtype=torch.float64)

    def add(self, run: Run) -> None:
        """Adds one whole run. Raises ProfileError where it lacks steps or streams, or holds NaN or infinity."""
        steps, prompt = len(self.identity["levels"]), f"prompt {self.done + 1}"
        for label, taken in run.taken.items():
            if sorted(taken.seen) != list(range(steps)):
                raise ProfileError(
                    f"{prompt}: stream {label!r} was called at {len(taken.seen)} of {steps} steps; a calibration needs "
                    "loops that call every stream once per step, like the recorded one"
                )
        if not self.done:
            self.streams = list(run.taken)
            shape = (len(self.streams), len(self.identity["sites"]), steps)
            self.gram = torch.zeros(*shape, steps, dtype=torch.float64)
            self.moved, self.size = torch.zeros(2, *shape, dtype=torch.float64)
        if list(run.taken) != self.streams:
            raise ProfileError(f"{prompt} has streams {list(run.taken)}, the first had {self.streams}")
        for k, taken in enumerate(run.taken.values()):
            known: dict[tuple[Port, ...], tuple[Tensor, ...]] = {}  # several names may mean one value
            for n, site in enumerate(taken.sites):
                if site.ports not in known:
                    sketches, coordinates = (taken.rows(part, site) for part in (taken.sketches, taken.coordinates))
                    known[site.ports] = (gram_matrix(sketches), *neighbours(coordinates))
                    if not all_finite(*known[site.ports]):
                        raise ProfileError(f"{prompt}: {_first_broken(run, steps)}; leave it out, or check the dtype")
                for total, value in zip((self.gram, self.moved, self.size), known[site.ports], strict=True):
                    total[k, n] += value

    def profile(self, sites: Sites) -> Profile:
        """The means over all prompts."""
        identity, steps = self.identity, len(self.identity["levels"])
        probed, raw = zip(*sorted(self.probes), strict=True)
        curve = np.interp(range(steps), probed, raw)
        scale = float(curve.mean())
        change = torch.where(self.size > 0, self.moved / self.size.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        return Profile(
            **{name: identity[name] for name in ("model", "weights", "scheduler", "dtype", "seed", "settings")},
            levels=tuple(identity["levels"]),
            streams=tuple(self.streams),
            costs=tuple(self.costs),
            default=sites.default if sites.default in identity["sites"] else identity["sites"][0],
            flops=sites.flops,
            seconds=self.seconds,
            prompts=self.done,
            probed=tuple(probed),
            sensitivity_scale=scale,
            gram=self.gram / self.done,
            neighbours=change.float(),
            sensitivity=torch.from_numpy(curve / scale if scale else np.ones(steps)).float(),
            versions={"torch": torch.__version__, "dcc": importlib.metadata.version("diffusion-cache-compiler")},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint, atomically."""
        header = self.identity | {name: getattr(self, name) for name in ("done", "streams", "seconds", "probes")}
        header["costs"] = [asdict(cost) for cost in self.costs]
        write_tensors(path, MARK, VERSION, header, {name: getattr(self, name) for name in SUMS})

    def load(self, path: str | os.PathLike[str], prompts: int) -> None:
        """Takes up a checkpoint of as many prompts.

        Raises ProfileError, naming the file and the field, where it is of another calibration or malformed.
        """
        header, tensors = read_tensors(path, MARK, VERSION, ProfileError)
        for name, value in self.identity.items():
            if header.get(name) != value:
                raise ProfileError(
                    f"{path}: this checkpoint has another {name} ({_short(header.get(name))}) than this calibration "
                    f"({_short(value)}); delete the file or give another checkpoint="
                )
        try:
            self._check(header, tensors, prompts)
        except ProfileError as error:
            raise ProfileError(f"{path}: this checkpoint is malformed: {error}; delete the file") from error
        self.done, self.streams, self.seconds = header["done"], header["streams"], header["seconds"]
        self.probes = [(step, ratio) for step, ratio in header["probes"]]
        self.costs = list(read_costs(header["costs"]))
        self.gram, self.moved, self.size = (tensors[name] for name in SUMS)

    def _check(self, header: dict[str, Any], tensors: dict[str, Tensor], prompts: int) -> None:
        """Raises ProfileError, naming the field, for anything that `save` does not write after some prompt."""
        known, steps, sites = (*self.identity, *STATE), len(self.identity["levels"]), self.identity["sites"]
        for found, wanted in ((header, known), (tensors, SUMS)):
            if odd := set(found) ^ set(wanted):
                raise ProfileError(f"field {min(odd)!r:.80} is {'unknown' if min(odd) in found else 'missing'}")
        done, streams, probes = header["done"], header["streams"], header["probes"]
        if not whole(done, 1) or done > prompts:
            raise ProfileError(f"field 'done' is {done!r:.80}, not a number of prompts from 1 to {prompts}")
        if not finite(header["seconds"]) or header["seconds"] < 0:
            raise ProfileError("field 'seconds' must be a finite number from 0 on")
        named = isinstance(streams, list) and all(isinstance(name, str) and name for name in streams)
        if not named or not streams or len(set(streams)) != len(streams):
            raise ProfileError("field 'streams' must be different names, at least one")
        if [cost.name for cost in read_costs(header["costs"])] != sites:
            raise ProfileError("field 'costs' must have one entry a site, in the order of 'sites'")
        spread = probe_steps(steps, prompts)
        due = [step for index in range(done) for step in _probed_with(index, spread, prompts)]
        pairs = isinstance(probes, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in probes)
        if not pairs or [step for step, _ in probes] != due or not all(finite(r) and r >= 0 for _, r in probes):
            raise ProfileError(f"field 'probes' must be a step and a finite number from 0 on, for each of {due}")
        shape = (len(streams), len(sites), steps)
        for name, sizes in zip(SUMS, ((*shape, steps), shape, shape), strict=True):
            check_tensor(tensors[name], name, sizes, torch.float64)


def _first_broken(run: Run, steps: int) -> str:
    """Names the site and stream that are NaN or infinite at the earliest step of a run."""
    found = []
    for label, taken in run.taken.items():
        for site in taken.sites:
            rows = torch.cat([taken.rows(part, site).flatten(1) for part in (taken.sketches, taken.coordinates)], 1)
            broken = (~rows.isfinite()).any(dim=1).nonzero().flatten().tolist()
            found += [(broken[0], site.name, label)] if broken else []
    step, site, label = min(found, default=(0, "output", "main"), key=lambda each: each[0])
    return f"site {site!r} of stream {label!r} is NaN or infinite from step {step + 1} of {steps} on"


def gram_matrix(rows: Tensor) -> Tensor:
    """Inner products [S, S] float64, on the CPU, of rows [S, n] float32.

    Sums up the products of step-to-step differences: forecasts depend on small differences of large values, and float32
    holds products of the differences, which would drown in products of the values themselves.
    """
    moves = torch.cat([rows[:1], rows.diff(dim=0)])
    gram = (moves @ moves.T).double().cpu().cumsum(0).cumsum(1)
    gram = (gram + gram.T) / 2
    gram.diagonal().clamp_(min=0)
    return gram


def neighbours(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [S] float64 of |row - row before| and of |row before|; zeros at step 0."""
    moved = rows.diff(dim=0).abs().sum(1, dtype=torch.float64)
    size = rows[:-1].abs().sum(1, dtype=torch.float64)
    zero = moved.new_zeros(1)
    return torch.cat([zero, moved]).cpu(), torch.cat([zero, size]).cpu()


def probe_steps(steps: int, prompts: int) -> list[int]:
    """Evenly spread steps to disturb: as many as max(1, 0.1 * prompts) whole runs pay for.

    A probe costs the steps from the disturbed one on, because those before it are not computed again.
    """
    budget = steps * max(1.0, PROBE_BUDGET * prompts)
    for count in range(min(steps, prompts * steps), 1, -1):
        spread = [min(math.ceil((probe + 0.5) * steps / count), steps - 1) for probe in range(count)]
        if sum(steps - step for step in spread) <= budget and len(set(spread)) == count:
            return spread
    return [steps // 2]


def _probed_with(index: int, probes: Sequence[int], prompts: int) -> list[int]:
    """The steps of `probe_steps` that are disturbed in runs of the prompt of this index."""
    return [step for probe, step in enumerate(probes) if probe * prompts // len(probes) == index]


def measured_costs(run: Recording, sites: Sites, names: Sequence[str]) -> tuple[list[SiteCost], float]:
    """What each named site costs in FLOPs, bytes and measured seconds of the recorded call; and that call's seconds."""
    captured, flow = sites.captured, sites.flow
    seconds = timings(captured.graph_module, captured.inputs_of(run.first))

    def spent(nodes: Iterable[str]) -> float:
        return sum(seconds.get(node, 0.0) for node in nodes)

    chosen = [sites[name] for name in names]
    costs = [SiteCost(s.name, s.kind, s.flops, s.bytes, spent(sorted(flow.spared(s.ports)))) for s in chosen]
    return costs, spent(sorted(flow.needed()))


def _generate(target: Target, instrument: Instrument, run: Run, prompt: Any, seed: int) -> Samples:
    instrument.start(run)
    return target.generate([prompt], [seed])


def _ratio(moved: Tensor, run: Run) -> float:
    """How far the final sample moved per unit of injected noise, both root mean squares."""
    squares, count = (sum(values) for values in zip(*run.injected, strict=True))
    return float(moved.double().square().mean().sqrt()) / math.sqrt(squares / count) if squares else 0.0


def _identity(
    subject: Subject, sites: Sequence[str], prompts: Sequence[Any], seed: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """What decides the result of a calibration, in the form that a JSON file gives back."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.cpu().numpy().tobytes() if isinstance(prompt, Tensor) else repr(prompt).encode())
    identity = {
        "model": subject.model,
        "dtype": dtype_of(subject.module),
        "weights": weights_hash(subject.module),
        "scheduler": subject.target.scheduler,
        "levels": list(subject.run.levels),
        "sites": list(sites),
        "settings": settings,
        "seed": seed,
        "prompts": f"{len(prompts)} prompts, {digest.hexdigest()[:16]}",
    }
    return json.loads(json.dumps(identity, default=lambda value: type(value).__name__))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
