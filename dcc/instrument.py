"""The denoiser of a calibration: computes every step, sketches every site on the way, or disturbs one step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from dcc.capture import Call, Captured
from dcc.errors import ProfileError
from dcc.fingerprint import fingerprint
from dcc.lower import Variant
from dcc.observe import Observer
from dcc.passes.base import Row, Site
from dcc.passes.drop_asserts import DropAsserts
from dcc.passes.graph import is_tensor, nodes_by_name, output_node
from dcc.passes.insert_sketches import InsertSketches, groups
from dcc.plan import make_plan
from dcc.predictors import Predictor
from dcc.record import Recording
from dcc.runtime import CompiledDenoiser, Family
from dcc.session import Stream
from dcc.sites import Sites, find_sites
from dcc.sketch import COORDINATES, SIZE

FULL = (1,)
NOISE = 0.05  # of the root mean square of a disturbed output


@dataclass
class Taken:
    """What one run showed of one stream, on the denoiser's device.

    Value v at step s, sample b: `sketches[v, s, b]` of SIZE and `coordinates[v, s, b]` of COORDINATES numbers, float32.
    """

    index: dict[str, int]
    sites: tuple[Site, ...]
    sketches: Tensor
    coordinates: Tensor
    seen: list[int] = field(default_factory=list)

    def of(self, tensor: Tensor, site: Site) -> Tensor:
        """Rows [S, n] of a site in one of the two tensors: values minus bases, samples and ports side by side."""
        parts = []
        for port in site.ports:
            value = tensor[self.index[port.out]]
            parts.append((value if port.base is None else value - tensor[self.index[port.base]]).flatten(1))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


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


class Instrumented(CompiledDenoiser):
    """Stands in for the denoiser in a calibration. Set `current` to a new Run before each run of the loop."""

    def __init__(
        self, original: nn.Module, recording: Recording, scheduler: str, captured: Captured, sites: Sites
    ) -> None:
        plan = make_plan(
            model=fingerprint(original),
            scheduler=scheduler,
            levels=recording.levels,
            sites=["output"],
            schedule=[FULL] * len(recording.levels),
            predictors=[Predictor("copy")],
            policy="calibration",
            parameters={},
        )
        super().__init__(original, plan, recording, lambda captured, _: self.instrument(captured), "eager")
        self.__dict__.update(current=Run(), site_names=tuple(site.name for site in floating(sites)))
        self.families.append(self.instrument(captured, sites))

    def instrument(self, captured: Captured, sites: Sites | None = None) -> Family:
        """The captured graph with sketches. Raises ProfileError where it lacks a site of the first captured one."""
        found = {site.name: site for site in floating(sites or find_sites(captured, captured.call))}
        lacking = [name for name in self.site_names if name not in found]
        if lacking:
            raise ProfileError(f"a call of another signature has no site {lacking[0]!r}; calibrate its module alone")
        chosen = tuple(found[name] for name in self.site_names)
        graph_module = _copy(captured)
        own = len(output_node(graph_module).args[0])
        passes = (DropAsserts(), InsertSketches(self._sample(captured)))
        Observer().run_all(graph_module, Row(computed=chosen), "sketches", passes)
        names = tuple(node.name for node in output_node(graph_module).args[0])
        inputs = tuple(node.name for node in graph_module.graph.nodes if node.op == "placeholder")
        variant = Variant("sketches", graph_module, inputs, own, names[own:])
        return Family(captured, (chosen,), {FULL: variant})

    def run(self, family: Family, call: Call, stream: Stream, row: tuple[int, ...], step: int) -> list[Tensor]:
        """Runs one call and keeps its sketches, or, in a disturbed run, replays or disturbs its outputs."""
        run = self.current
        label = run.label(stream)
        if run.disturbed is None:
            variant = family.variants[FULL]
            values = family.captured.bindings(call)
            results = variant.graph_module(*(values[name] for name in variant.inputs))
            self._take(family, label, step, results[variant.outputs :])
            outputs = list(results[: variant.outputs])
            if run.keep_outputs:
                run.outputs[label, step] = outputs
            return outputs
        if step < run.disturbed:
            return run.outputs[label, step]
        outputs = list(family.captured.graph_module(*family.captured.inputs_of(call)))
        return self._disturb(outputs, step) if step == run.disturbed else outputs

    def _take(self, family: Family, label: str, step: int, extra: list[Tensor]) -> None:
        taken, chosen = self.current.taken, family.selectors[0]
        if label not in taken:
            names = [name for group in groups(family.captured.graph_module, chosen) for name in group]
            shape = (len(names), self.plan.steps, extra[0].shape[1])
            taken[label] = Taken(
                {name: index for index, name in enumerate(names)},
                chosen,
                extra[0].new_zeros(*shape, SIZE),
                extra[0].new_zeros(*shape, COORDINATES),
            )
        start, own = 0, taken[label]
        for sketches, coordinates in zip(extra[::2], extra[1::2], strict=True):
            stop = start + len(sketches)
            own.sketches[start:stop, step] = sketches
            own.coordinates[start:stop, step] = coordinates
            start = stop
        own.seen.append(step)

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
        moving = [
            (tensor.numel(), name)
            for name, tensor in zip(captured.call.names, captured.call.tensors, strict=True)
            if name in captured.inputs and (name in self.recording.varying or not self.recording.varying)
        ]
        if not moving:
            raise ProfileError("no input of this denoiser changes from step to step; there is nothing to calibrate")
        return captured.inputs[max(moving)[1]]


def floating(sites: Sites) -> list[Site]:
    """The sites whose values are all floating point numbers."""
    nodes = nodes_by_name(sites.captured.graph_module)
    return [
        site
        for site in sites
        if all(is_tensor(nodes[p.out]) and nodes[p.out].meta["val"].is_floating_point() for p in site.ports)
    ]


def _copy(captured: Captured) -> GraphModule:
    graph = Graph()
    graph.output(graph.graph_copy(captured.graph_module.graph, {}))
    return GraphModule(captured.graph_module, graph)
