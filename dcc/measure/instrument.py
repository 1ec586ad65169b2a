"""The denoiser of a calibration: computes every step, sketches every site on the way, or disturbs one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dcc.capture.captured import Captured
from dcc.discover.sites import Sites
from dcc.discover.subject import Subject
from dcc.errors import ProfileError
from dcc.passes.base import GUIDANCE, Row, Site
from dcc.passes.drop_asserts import DropAsserts
from dcc.passes.graph import is_tensor, nodes_by_name
from dcc.passes.insert_sketches import InsertSketches, Sketches, groups
from dcc.plans.predictors import Predictor
from dcc.record.call import Call
from dcc.serve.binding import Binding, Tables
from dcc.serve.denoiser import CompiledDenoiser
from dcc.serve.session import Stream
from dcc.variants.build import Family
from dcc.variants.cost import planned
from dcc.variants.observe import Observer
from dcc.variants.variant import variant

FULL = (1,)
NOISE = 0.05  # the noise, as a share of the root mean square of the disturbed output


@dataclass
class Taken:
    """What one run showed of one stream, on the denoiser's device.

    `groups` are the values sketched together; `sketches[g][v, s, b]` and `coordinates[g][v, s, b]` hold those of value
    v of group g at step s, sample b, float32.
    """

    sites: tuple[Site, ...]
    groups: list[list[str]]
    sketches: list[Tensor] = field(default_factory=list)
    coordinates: list[Tensor] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)

    def take(self, extra: Sequence[Tensor], step: int, steps: int) -> None:
        """Keeps the extra outputs of the call at one step."""
        for tensors, new in ((self.sketches, extra[::2]), (self.coordinates, extra[1::2])):
            shapes = [(len(value), steps, *value.shape[1:]) for value in new]
            if [tuple(tensor.shape) for tensor in tensors] != shapes:
                tensors[:] = [value.new_empty(shape) for value, shape in zip(new, shapes, strict=True)]
            for tensor, value in zip(tensors, new, strict=True):
                tensor[:, step] = value
        self.seen.append(step)

    def rows(self, tensors: list[Tensor], site: Site) -> Tensor:
        """Rows [S, n] of a site in `sketches` or `coordinates`: values minus bases, samples and ports side by side."""
        named = {name: tensors[g][v] for g, group in enumerate(self.groups) for v, name in enumerate(group)}
        parts = [named[p.out] if p.base is None else named[p.out] - named[p.base] for p in site.ports]
        flat = [part.flatten(1) for part in parts]
        return torch.cat(flat, dim=1) if len(flat) > 1 else flat[0]


@dataclass
class Run:
    """One run under way: what is kept of it, and, where `disturbed` is a step, what disturbs it.

    `outputs` of an earlier run stand for those of the steps before the disturbed one, which would be the same.
    """

    keep_outputs: bool = False
    disturbed: int | None = None
    seed: int = 0
    outputs: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    taken: dict[str, Taken] = field(default_factory=dict)
    streams: list[Stream] = field(default_factory=list)  # those of this run, in the order of their first calls
    injected: list[tuple[float, int]] = field(default_factory=list)  # sum of squares and count of the noise

    def label(self, stream: Stream) -> str:
        """The stream's name, numbered where several have the same."""
        if not any(stream is known for known in self.streams):
            self.streams.append(stream)
        position = next(i for i, known in enumerate(self.streams) if known is stream)
        before = sum(known.name == stream.name for known in self.streams[:position])
        return f"{stream.name}.{before}" if before else stream.name


class Instrument:
    """Runs the calls of a calibration in a CompiledDenoiser. Call `start` with a new Run before each run."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.site_names = tuple(site.name for site in floating(subject.sites))
        self.current = Run()
        self.spare: dict[str, Taken] = {}  # by stream, the memory of the last run
        self.tables = Tables()

    def denoiser(self) -> CompiledDenoiser:
        """A CompiledDenoiser whose calls this instrument serves."""
        plan = planned(
            self.subject,
            sites=["output"],
            schedule=[FULL] * self.subject.steps,
            predictors=[Predictor("copy")],
            policy="calibration",
            parameters={},
        )
        return CompiledDenoiser(self.subject, plan, runner=self)

    def build(self, sites: Sites) -> Family:
        """The captured graph with sketches. Raises ProfileError where it lacks a site of the first captured graph."""
        found = {site.name: site for site in floating(sites)}
        lacking = [name for name in self.site_names if name not in found]
        if lacking:
            raise ProfileError(f"a call of another signature has no site {lacking[0]!r}; calibrate its module alone")
        chosen = tuple(found[name] for name in self.site_names)
        order = Sketches(chosen, self._sample(sites.captured))
        passes = (DropAsserts(), InsertSketches())
        sketched = variant(sites.captured, Row((order,)), "sketches", Observer(), passes)
        return Family(sites.captured, sites, (chosen,), {FULL: sketched})

    def warm(self, family: Family, call: Call, say: Callable[[str], None]) -> None:
        """Does nothing: the instrumented graphs run eagerly."""

    def serve(self, family: Family, call: Call, stream: Stream, step: float) -> list[Tensor]:
        """Runs one call and keeps its sketches, or, in a disturbed run, replays or disturbs its outputs.

        Raises ProfileError for a call between the noise levels of the recorded run.
        """
        if step != int(step):
            raise ProfileError(
                f"a call stands between steps {int(step)} and {int(step) + 1} of the recorded run; all prompts of a "
                "calibration must take the same noise levels"
            )
        run, step = self.current, int(step)
        label = run.label(stream)
        if run.disturbed is None:
            sketched = family.variants[FULL]
            binding = Binding(self.tables, family.captured, call, step)
            results = sketched.graph_module(*binding.of(sketched.takes))
            self._take(family, label, step, results[sketched.outputs :])
            outputs = list(results[: sketched.outputs])
            if run.keep_outputs:
                run.outputs[label, step] = outputs
            return outputs
        if step < run.disturbed:
            return run.outputs[label, step]
        outputs = list(family.captured.graph_module(*family.captured.inputs_of(call)))
        return self._disturb(outputs, step) if step == run.disturbed else outputs

    def _take(self, family: Family, label: str, step: int, extra: Sequence[Tensor]) -> None:
        if label not in self.current.taken:
            chosen = family.selectors[0]
            # the memory of the last run, whose sketches have been read by now
            taken = self.spare.pop(label, None) or Taken(chosen, groups(family.captured.graph_module, chosen))
            taken.seen.clear()
            self.current.taken[label] = taken
        self.current.taken[label].take(extra, step, self.subject.steps)

    def start(self, run: Run) -> None:
        """Makes `run` the current one. It takes over the memory of the last run, which must have been read."""
        self.spare, self.current = self.current.taken or self.spare, run

    def _disturb(self, outputs: list[Tensor], step: int) -> list[Tensor]:
        run = self.current
        generator = torch.Generator().manual_seed(run.seed + 7919 * (1 + step) + len(run.injected))
        disturbed = []
        for output in outputs:
            if output.is_floating_point():
                noise = torch.randn(output.shape, generator=generator).to(output.device)
                noise = (NOISE * output.float().square().mean().sqrt() * noise).to(output.dtype)
                run.injected.append((float(noise.double().square().sum()), noise.numel()))
                output = output + noise
            disturbed.append(output)
        return disturbed

    def _sample(self, captured: Captured) -> str:
        """The graph input whose first dimension is the batch: the largest tensor that moves from step to step."""
        call, varying = captured.call, self.subject.run.varying
        moving = [
            (tensor.numel(), name)
            for name, tensor in zip(call.names, call.tensors, strict=True)
            if name in captured.inputs and (name in varying or not varying)
        ]
        if not moving:
            raise ProfileError("no input of this denoiser changes from step to step; there is nothing to calibrate")
        return captured.inputs[max(moving)[1]]


def floating(sites: Sites) -> list[Site]:
    """The sites whose values are all floating point numbers, except `uncond`, which has half the batch of others."""
    nodes = nodes_by_name(sites.captured.graph_module)
    return [
        site
        for site in sites
        if site.kind != GUIDANCE
        and all(is_tensor(nodes[p.out]) and nodes[p.out].meta["val"].is_floating_point() for p in site.ports)
    ]
