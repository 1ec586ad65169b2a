"""One self-contained HTML page of a report: templates/report.html.j2 filled in, pictures as data URIs."""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from dcc.decisions import Decision
from dcc.plans.plan import Plan
from dcc.quality import mean_psnr
from dcc.report.grid import amplification
from dcc.report.rows import Comparison, Row
from dcc.report.scatter import Point, scatter
from dcc.text import decibels, human_bytes, human_seconds

LARGEST = 512  # pixels: larger pictures are shrunk to this side
LOSSLESS = 128  # pixels: up to this side a picture is a PNG, shown pixel by pixel; above it a JPEG
SIDE, CROWD = 192, 5  # pixels of a picture's width on the page; two thirds of it from this many plans on
CELL, WIDEST = 16, 720  # pixels of a schedule's cell, and of a whole schedule
COMPUTED, FORECAST, REFRESHED, DECIDED = "computed", "forecast", "refreshed", "decided"
KINDS = {  # how a step may treat a site, and what the key of the drawing calls it
    COMPUTED: "computed",
    FORECAST: "forecast",
    REFRESHED: "forecast but for some tokens",
    DECIDED: "decided at run time",
}


def page(report: Comparison) -> str:
    """The page as HTML text."""
    colours = {row.name: to_hex(colormaps["tab10"](i % 10)) for i, row in enumerate(report.rows)}
    scored = [row for row in report.rows if row.psnr and not row.error]
    differences = [(own - reference).abs() for row in scored for reference, own in row.pictures.values()]
    factor = statistics.median_low([amplification(d.float()) for d in differences] or [1])
    schedules = [_schedule(row.name, row.plan, colours[row.name]) for row in report.rows if row.plan]
    drawn = {kind for schedule in schedules for line in schedule["lines"] for kind, _ in line["cells"]}
    environment = Environment(
        loader=PackageLoader("dcc.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        summary=[_cells(report, row) | {"colour": colours[row.name]} for row in report.rows],
        reference=_cells(report, report.reference),
        plot=_plot(report, scored, colours) if scored else None,
        schedules=schedules,
        kinds={kind: text for kind, text in KINDS.items() if kind in drawn},
        scenes=[_scene(report, scored, i, factor) for i in _first_prompts(scored, report.shown)],
        worst=[_panels(row, row.worst, factor, report) for row in scored if row.worst is not None and _has_worst(row)],
        factor=factor,
        clamped=any(row.psnr_raw != row.psnr for row in scored),
        side=SIDE if len(scored) < CROWD else SIDE * 2 // 3,
    )


def _cells(report: Comparison, row: Row) -> dict[str, Any]:
    """A row of the summary table as text; empty for what was not measured."""
    plan, measured = row.plan, bool(row.seconds)

    def fidelity(psnr: list[float], ssim: list[float]) -> dict[str, str]:
        return {
            "psnr": decibels(mean_psnr(psnr)) if psnr else "",
            "psnr_worst": decibels(min(psnr)) if psnr else "",
            "ssim": f"{statistics.fmean(ssim):.4f}" if ssim else "",
            "ssim_worst": f"{min(ssim):.4f}" if ssim else "",
        }

    return {
        "name": row.name,
        "full": row.full_steps.replace("/", " of ") if plan else "",
        "flops": f"{row.ideal:.2f}x" if row.ideal else "",
        "speedup": f"{report.speedup(row):.2f}x" if measured else "",
        "share": f"{report.speedup(row) / row.ideal:.0%}" if measured and row.ideal else "",
        "latency": human_seconds(row.latency) if measured else "",
        "after": fidelity(row.psnr, row.ssim),
        "before": fidelity(row.psnr_raw, row.ssim_raw),
        "cache": human_bytes(row.cache_bytes) if row.cache_bytes else "none" if measured else "",
        "calls": f"{row.computed} + {row.forecast}" if measured else "",
        "missed": str(row.missed) if measured else "",
        "notes": row.notes,
        "error": row.error,
    }


def _plot(report: Comparison, scored: list[Row], colours: dict[str, str]) -> str:
    """The scatter plot as a data URI."""

    def points(speedup: Any) -> list[Point]:
        found = [(row, speedup(row)) for row in scored]
        return [
            Point(row.name, x, mean_psnr(row.psnr), min(row.psnr), colours[row.name])
            for row, x in found
            if math.isfinite(x)
        ]

    panels: dict[str, Sequence[Point]] = {
        "speed-up in denoiser FLOPs": points(lambda row: row.ideal),
        "measured speed-up of the whole run": points(report.speedup),
    }
    return _uri("image/svg+xml", scatter(panels).encode())


def _schedule(name: str, plan: Plan, colour: str) -> dict[str, Any]:
    """The lines of a plan's drawing: sites that do the same at every step share one."""
    lines: dict[tuple[int, ...], list[str]] = {}
    for k, site in enumerate(plan.sites):
        lines.setdefault(tuple(row[k] for row in plan.schedule), []).append(site)
    drawn = []
    for column, sites in lines.items():
        k = plan.sites.index(sites[0])
        label = sites[0] if len(sites) == 1 else f"{sites[0]} and {len(sites) - 1} more"
        cells = []
        for step, decision in enumerate(column):
            kind = _kind(plan, decision)
            said = _forecast(plan, step, k) if kind in (FORECAST, REFRESHED) else kind
            cells.append((kind, f"step {step}, level {plan.levels[step]:.4g}: {said}"))
        drawn.append({"label": label, "title": ", ".join(sites), "cells": cells})
    full = f"{sum(plan.steps_mask)} of {plan.steps} full steps, {plan.policy}"
    size = min(CELL, WIDEST / plan.steps)
    return {"name": name, "colour": colour, "full": full, "lines": drawn, "cell": size, "steps": plan.steps}


def _kind(plan: Plan, decision: int) -> str:
    """How a cell of a schedule is drawn: a key of KINDS."""
    if plan.trigger and decision != Decision.COMPUTE:
        return DECIDED
    return {Decision.COMPUTE: COMPUTED, Decision.REFRESH: REFRESHED}.get(Decision(decision), FORECAST)


def _forecast(plan: Plan, step: int, k: int) -> str:
    anchors = plan.anchor_steps(step, k)
    rows = [
        ", ".join(f"{w:+.3g} of step {s}" for w, s in zip(weights, anchors, strict=False))
        for weights in plan.weights(step, k)
    ]
    refreshed = plan.schedule[step][k] == Decision.REFRESH
    return f"{KINDS[REFRESHED] if refreshed else FORECAST}, {'; '.join(rows)}"


def _first_prompts(scored: list[Row], shown: int) -> list[int]:
    return sorted({i for row in scored for i in row.pictures if i < shown})


def _has_worst(row: Row) -> bool:
    """Whether there is a worst prompt to show: it has pictures, and they are not identical."""
    return row.worst in row.pictures and math.isfinite(row.psnr[row.worst])


def _scene(report: Comparison, scored: list[Row], index: int, factor: int) -> dict[str, Any]:
    """One prompt through the reference and every plan."""
    rows = [row for row in scored if index in row.pictures]
    return {
        "prompt": report.prompts[index],
        "number": index + 1,
        "reference": _image(rows[0].pictures[index][0]),
        "plans": [_panels(row, index, factor, report) for row in rows],
    }


def _panels(row: Row, index: int, factor: int, report: Comparison) -> dict[str, Any]:
    reference, own = (part.float() for part in row.pictures[index])
    similar = f", SSIM\u00a0{row.ssim[index]:.3f}" if row.ssim else ""
    return {
        "name": row.name,
        "prompt": report.prompts[index],
        "number": index + 1,
        "score": f"{decibels(row.psnr[index])}{similar}",
        "reference": _image(reference),
        "own": _image(own),
        "difference": _image(((own - reference).abs() * factor).clamp(0, 1)),
    }


def _image(picture: Tensor) -> str:
    """A picture [3, h, w] in [0, 1] as a data URI."""
    pixels = (picture.float() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    image.thumbnail((LARGEST, LARGEST))
    kind, options = ("png", {"optimize": True}) if max(image.size) <= LOSSLESS else ("jpeg", {"quality": 92})
    data = io.BytesIO()
    image.save(data, kind, **options)
    return _uri(f"image/{kind}", data.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
