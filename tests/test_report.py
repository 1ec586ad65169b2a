"""A report's files and tables: what they say, that they are whole, and that nothing is left out."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from dcc.plans.plan import Plan, make_plan, with_costs
from dcc.plans.predictors import Predictor
from dcc.plans.triggers import Anchored
from dcc.report.report import Report, Row
from dcc.report.scatter import Point, scatter
from dcc.report.tables import steps_table
from dcc.text import render

PROMPTS = ["a red circle", "a <b>bold</b> square", "a green cross", "two stars"]


def a_plan(full_every: int, sites: tuple[str, ...] = ("stack",), steps: int = 12) -> Plan:
    plan = make_plan(
        model="0123456789abcdef",
        scheduler="DDIMScheduler",
        levels=[1 - s / steps for s in range(steps)],
        sites=sites,
        schedule=[[s % full_every == 0] * len(sites) for s in range(steps)],
        predictors=[Predictor("copy")] * len(sites),
        policy="interval",
        parameters={"interval": full_every},
    )
    return with_costs(plan, {(1,) * len(sites): 10**9, (0,) * len(sites): 10**7}, 40 * 1024)


def a_row(name: str, every: int, base: float, seconds: float, pictures: bool = True) -> Row:
    row = Row(name, a_plan(every), [seconds] * 4)
    for i in range(4):
        row.psnr.append(base + (i - 2) ** 2)
        row.psnr_raw.append(row.psnr[-1] - 0.5)
        row.ssim.append(0.9)
        row.ssim_raw.append(0.89)
        if pictures:
            row.keep(i, torch.full((3, 16, 16), 0.5).half(), torch.full((3, 16, 16), 0.5 + i / 10).half(), 1)
    return row


def a_report() -> Report:
    broken = Row("broken", None, error="planning: SiteError: no site 'x'")
    same = Row("the same", a_plan(1), [1.0] * 4, [math.inf] * 4, [1.0] * 4, [math.inf] * 4, [1.0] * 4)
    noted = a_row("copy 4", 4, 25.0, 0.3)
    noted.notes.append("variant row1 runs eagerly: Inductor: no compiler")
    return Report(
        Row("uncached", a_plan(1), [1.0] * 4),
        [a_row("copy 3", 3, 31.0, 0.4), noted, broken, same],
        PROMPTS,
        {"denoiser": "Net", "scheduler": "DDIMScheduler, 12 steps", "prompts": "4 prompts, seeds from 0"}
        | {"backend": "eager", "device": "cpu"},
        shown=1,
    )


class Links(HTMLParser):
    """Every address that a page loads or links to, and its visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_only_the_first_and_the_worst_pictures_are_kept():
    row = a_row("copy", 3, 30.0, 1.0)
    assert row.worst == 2 and set(row.pictures) == {0, 2}


def test_speed_up_compares_the_runs_that_both_made():
    report = a_report()
    assert report.speedup(report["copy 3"]) == pytest.approx(2.5)
    report.reference.seconds[:] = [1.0, 1.0, 9.0, 9.0]
    assert report.speedup(Row("x", None, [0.5, 0.5])) == pytest.approx(2.0)
    assert math.isnan(report.speedup(report["broken"]))


def test_a_row_is_found_by_its_name():
    with pytest.raises(KeyError, match="copy 3, copy 4, broken"):
        a_report()["missing"]


def test_json_has_every_number_and_is_strict(tmp_path: Path):
    a_report().to_json(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    rows = {row["name"]: row for row in data["rows"]}
    assert list(rows) == ["copy 3", "copy 4", "broken", "the same"]
    assert rows["copy 3"]["samples"]["psnr"] == [35.0, 32.0, 31.0, 32.0] and rows["copy 3"]["psnr_worst"] == 31.0
    assert rows["copy 3"]["psnr_mean"] == 32.5 and rows["copy 3"]["psnr_raw_worst"] == 30.5
    assert rows["copy 3"]["schedule"][:4] == [[1], [0], [0], [1]] and rows["copy 3"]["parameters"] == {"interval": 3}
    assert float(rows["the same"]["psnr_mean"]) == math.inf
    assert rows["broken"]["error"].startswith("planning: SiteError") and rows["broken"]["speedup_flops"] is None
    assert rows["copy 4"]["notes"] == ["variant row1 runs eagerly: Inductor: no compiler"]
    assert data["facts"]["device"] == "cpu" and data["reference"]["latency_seconds"] == 1.0


def test_csv_has_a_line_a_plan(tmp_path: Path):
    a_report().to_csv(tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == ["uncached", "copy 3", "copy 4", "broken", "the same"]
    assert float(lines[1]["speedup_measured"]) == pytest.approx(2.5)
    assert lines[3]["error"] == "planning: SiteError: no site 'x'" and lines[3]["psnr_mean"] == ""
    assert float(lines[4]["psnr_mean"]) == math.inf


def test_the_page_is_self_contained_and_says_everything(tmp_path: Path):
    a_report().save_html(tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    page = Links()
    page.feed(html)
    assert page.addresses and all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script", html)
    for text in ("copy 3", "2.50x", "31.0 dB", "failed: planning: SiteError", "note: variant row1", "DDIMScheduler"):
        assert text in page.text
    assert "a <b>bold</b> square" not in html  # escaped
    assert "Worst prompt of each plan" in page.text and "prompt 3: a green cross" in page.text
    # the plot; 3 pictures per worst prompt of two plans; reference, and own and difference of two plans, of one prompt
    assert len(page.addresses) == 1 + 3 * 2 + 1 + 2 * 2
    assert html.count("<rect") == 12 * 3


def test_a_page_without_pictures_or_any_success(tmp_path: Path):
    report = a_report()
    report.rows = [a_row("latents", 3, 30.0, 0.5, pictures=False), report["broken"]]
    report.save_html(tmp_path / "r.html")
    assert "Worst prompt" not in (tmp_path / "r.html").read_text()
    report.rows = [report["broken"]]
    report.save_html(tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert "SiteError" in html and "Fidelity against" not in html and "Schedules" not in html


def test_sites_with_one_schedule_share_a_line(tmp_path: Path):
    report = a_report()
    report.rows = [a_row("many", 3, 30.0, 0.5)]
    report.rows[0].plan = a_plan(3, ("attn", "mlp", "norm"))
    report.save_html(tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert "attn and 2 more" in html and html.count("<rect") == 12


def test_steps_that_compute_some_tokens_or_are_decided_are_drawn_as_what_they_are(tmp_path: Path):
    """Neither is a computed step, whatever number the schedule holds for it."""
    facts = {
        "model": "m", "scheduler": "s", "levels": (4.0, 3.0, 2.0, 1.0), "sites": ["mlp"],
        "predictors": [Predictor("copy")], "policy": "test", "parameters": {},
    }  # fmt: skip
    tokens = {"tokens": {"select": "random", "ratio": [0.5]}}
    refreshed = make_plan(**facts, schedule=[[1], [2], [0], [1]], forms=[tokens])
    decided = make_plan(**facts, schedule=[[1], [0], [0], [1]], trigger=Anchored("mlp", 0.1))
    report = a_report()
    report.rows = [a_row("refreshed", 3, 30.0, 0.5), a_row("decided", 3, 30.0, 0.5)]
    report.rows[0].plan, report.rows[1].plan = refreshed, decided
    report.save_html(tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert re.findall(r'<rect class="(\w+)"', html) == [
        "computed", "refreshed", "forecast", "computed", "computed", "decided", "decided", "computed"
    ]  # fmt: skip
    for key in ("forecast but for some tokens", "decided at run time"):
        assert key in html
    shown = [render(steps_table(plan), 100).splitlines() for plan in (refreshed, decided)]
    assert "some tokens computed; +1 of 0" in shown[0][2] and "+1 of 0" in shown[0][3]
    assert ["decided at run time" in line for line in shown[1][1:]] == [False, True, True, False]


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "r.html"
    path.write_text("old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    for write in (a_report().save_html, a_report().to_csv, a_report().to_json):
        with pytest.raises(OSError, match="disk full"):
            write(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_and_cuts_nothing_off(width: int):
    report = a_report()
    report.rows[0].name = "taylorseer interval=4 order=1 site=blocks[0:12]"
    text = render(report, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for part in ("2.50x", "4/12", "failed", "same", "31.0", "0.900"):
        assert part in text
    assert "broken: failed: planning: SiteError" in text and "copy 4: note: variant row1" in " ".join(text.split())


def test_str_is_the_table_at_80_columns():
    assert str(a_report()) == render(a_report(), 80)


def test_points_of_the_plot_are_all_there_whatever_their_values():
    points = [Point(f"a plan with a long name, number {i}", 2.0, 30.0, 28.0, "#1f77b4") for i in range(12)]
    points += [Point("identical $5_x^", 1.0, math.inf, math.inf, "#ff7f0e")]
    svg = scatter({"FLOPs": points, "measured": points})
    assert svg == scatter({"FLOPs": points, "measured": points})  # the same file for the same numbers
    assert svg.count("#ff7f0e") >= 2
    assert "<svg" in scatter({"FLOPs": points[-1:]})
