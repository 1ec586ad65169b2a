"""What a compiled denoiser was planned to do and what it really did, for people and for programs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from dcc.capture.captured import Captured
from dcc.lower.program import Program
from dcc.plans.plan import Plan
from dcc.serve.session import Counts
from dcc.text import human_bytes, render


@dataclass(frozen=True)
class Summary:
    """Counters of a CompiledDenoiser; `problems` says everything that did not go as asked."""

    plan: Plan
    backend: str
    variants: int
    programs: int
    captures: int
    captured: str  # where the graphs come from
    compile_seconds: float
    computed: int
    forecast: int
    missed: int
    sessions: int
    cache_bytes: int
    problems: tuple[str, ...]
    speedup: float  # in FLOPs: as planned, or, under a trigger, so far
    syncs: int = 0
    regions: int = 0
    hoisted_bytes: int = 0  # bytes of what no step changes, held beside the cache
    prologues: int = 0  # how often what no step changes was computed
    originals: int = 0  # calls that the module itself answered, outside of the plan

    @classmethod
    def of(
        cls,
        plan: Plan,
        counts: Counts,
        captures: Sequence[Captured],
        programs: Collection[Program],
        backend: str,
        notes: Mapping[str, int],
    ) -> Summary:
        """The summary of what a denoiser has counted so far; `compile_seconds` are those of the lowering alone."""
        opaque = [f"not exported, cached at its output only: {c.problem}" for c in captures if c.problem]
        problems = [*dict.fromkeys(opaque), *(f"{said} ({n} times)" if n > 1 else said for said, n in notes.items())]
        problems += [f"variant {p.variant.name} {said}" for p in programs for said in p.problems]
        if counts.missed:
            problems.append(f"{counts.missed} planned forecasts were computed, because their anchors were not there")
        if counts.guarded:
            problems.append(f"the guard computed {counts.guarded} steps more than planned, for harder prompts")
        if counts.mapped:
            problems.append(
                f"{counts.mapped} calls at other noise levels than the plan's: anchors and coefficients were mapped to "
                "them; a plan made for this run may be better"
            )
        if counts.forgotten:
            problems.append(f"{counts.forgotten} unfinished generations were forgotten")
        planned = plan.steps - sum(plan.steps_mask)
        if planned == 0 or (plan.trigger and counts.computed and not counts.forecast):
            what = "the trigger has forecast no step so far" if planned else "this plan computes every step"
            problems.append(f"{what}: it is the original model, nothing is saved")
        return cls(
            plan=plan,
            backend=backend,
            variants=len(plan.rows),
            programs=len(programs),
            captures=len({id(c.graph_module) for c in captures}),
            captured="; ".join(dict.fromkeys(c.origin for c in captures)),
            compile_seconds=sum(p.seconds for p in programs),
            computed=counts.computed,
            forecast=counts.forecast,
            missed=counts.missed,
            originals=counts.originals,
            sessions=counts.sessions,
            cache_bytes=counts.peak_bytes,
            problems=tuple(problems),
            speedup=counts.flops_uncached / counts.flops if counts.flops else plan.speedup,
            syncs=counts.syncs,
            regions=counts.regions,
            hoisted_bytes=counts.peak_hoisted,
            prologues=counts.prologues,
        )

    def __rich__(self) -> Table:
        table = Table(show_header=False, box=None, pad_edge=False)
        calls = self.computed + self.forecast + self.missed + self.originals
        originals = f", {self.originals} by the original" if self.originals else ""
        rows = {
            "policy": f"{self.plan.policy}, {self.plan.steps} steps, {sum(self.plan.steps_mask)} of them full",
            "steps mask": "".join(map(str, self.plan.steps_mask)),
            "expected": "decided at run time" if self.plan.trigger else f"{self.plan.speedup:.2f}x fewer FLOPs",
            "calls": f"{calls}: {self.computed} computed, {self.forecast} forecast, "
            f"{self.missed} missed{originals}, in {self.sessions} sessions",
            "compiled": f"{self.variants} variants, {self.programs} programs ({self.backend}), "
            f"{self.captures} captures ({self.captured}), {self.compile_seconds:.1f} s",
            "cache": f"{human_bytes(self.cache_bytes)} at most so far",
        }
        if self.hoisted_bytes:
            rows["hoisted"] = f"{human_bytes(self.hoisted_bytes)} at most so far, computed {self.prologues} times"
        if self.plan.trigger:
            rows["so far"] = f"{self.speedup:.2f}x fewer FLOPs, {self.syncs} host reads, {self.regions} regions entered"
        for name, value in rows.items():
            table.add_row(name, value)
        for problem in self.problems:
            table.add_row("[yellow]note[/]", problem)
        return table

    def __str__(self) -> str:
        return render(self)
