"""The demo's picture: its panels, read back pixel by pixel."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dcc.report.grid import COLUMNS, GAP, LABEL, LARGEST, PANEL, save_grid

CAPTION = "a small green circle left of a large orange triangle on a white background"


def flat(*values: float, size: int = 64) -> Tensor:
    """Images [n, 3, size, size], each of one grey value."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, size, size)


def read(path: Path) -> np.ndarray:
    """Pixels [height, width, 3] from 0 to 255."""
    return np.asarray(Image.open(path).convert("RGB"))


def panel_rows(pixels: np.ndarray, x: int) -> list[tuple[int, int, int]]:
    """Runs of equal, not white pixels down column x that are as tall as a panel: (top, height, grey)."""
    column, runs, start = pixels[:, x, 0].astype(int), [], 0
    for y in range(1, len(column) + 1):
        if y == len(column) or column[y] != column[start]:
            if y - start > PANEL // 2 and column[start] != 255:
                runs.append((start, y - start, int(column[start])))
            start = y
    return runs


def test_a_grid_has_a_row_for_each_kind_and_a_column_for_each_prompt(tmp_path):
    path = tmp_path / "grid.png"
    save_grid(
        path, ["one", CAPTION, "three"], flat(0.2, 0.4, 0.6), flat(0.3, 0.4, 0.5), "title", ["30 dB"] * 3, amplify=4
    )
    pixels = read(path)
    assert pixels.shape[1] == LABEL + 3 * (PANEL + GAP)
    greys = []
    for column in range(3):
        rows = panel_rows(pixels, LABEL + column * (PANEL + GAP) + PANEL // 2)
        assert [height for _, height, _ in rows] == [PANEL] * 3
        greys.append([grey / 255 for _, _, grey in rows])
    expected = [[0.2, 0.3, 0.4], [0.4, 0.4, 0.0], [0.6, 0.5, 0.4]]
    assert np.allclose(greys, expected, atol=0.01)


@pytest.mark.parametrize(("difference", "grey"), [(0.0, 0.0), (0.001, 0.064), (0.1, 0.8), (0.4, 0.8), (0.9, 0.9)])
def test_differences_are_amplified_as_far_as_they_fit(tmp_path, difference: float, grey: float):
    save_grid(tmp_path / "grid.png", ["a"], flat(0.0), flat(difference))
    assert panel_rows(read(tmp_path / "grid.png"), LABEL + PANEL // 2)[-1][2] / 255 == pytest.approx(grey, abs=0.01)


def test_pixels_are_enlarged_to_squares_without_smoothing(tmp_path):
    board = (torch.arange(64)[:, None] + torch.arange(64)[None]).remainder(2).float().expand(1, 3, -1, -1)
    save_grid(tmp_path / "grid.png", ["a"], board, board)
    pixels = read(tmp_path / "grid.png")[:, LABEL : LABEL + PANEL, 0]
    top = next(y for y in range(len(pixels)) if (pixels[y] == 0).sum() == PANEL // 2)
    scale = PANEL // 64
    assert np.array_equal(pixels[top : top + PANEL], np.kron(board[0, 0].numpy(), np.ones((scale, scale))) * 255)


def test_more_prompts_than_columns_make_another_band(tmp_path):
    n = COLUMNS + 2
    values = [0.5] * n
    save_grid(tmp_path / "grid.png", ["caption"] * n, flat(*values), flat(*values))
    pixels = read(tmp_path / "grid.png")
    assert pixels.shape[1] == LABEL + COLUMNS * (PANEL + GAP)
    assert len(panel_rows(pixels, LABEL + PANEL // 2)) == 6
    assert len(panel_rows(pixels, LABEL + (COLUMNS - 1) * (PANEL + GAP) + PANEL // 2)) == 3


def test_large_and_oblong_images_are_shrunk(tmp_path):
    images = torch.rand(1, 3, 512, 1024)
    save_grid(tmp_path / "grid.png", ["a"], images, images)
    pixels = read(tmp_path / "grid.png")
    assert pixels.shape[1] == LABEL + LARGEST + GAP
    assert pixels.shape[0] > 3 * LARGEST // 2


def test_captions_are_text_not_formulas_and_title_is_optional(tmp_path):
    save_grid(tmp_path / "grid.png", ["costs $5 to _draw^ $"], flat(0.1), flat(0.1))
    assert read(tmp_path / "grid.png").size


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")

    def fail(self: Figure, target: io.BytesIO, **kwargs: object) -> None:
        target.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_grid(path, ["a"], flat(0.1), flat(0.1))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_images_and_prompts_must_pair_up(tmp_path):
    with pytest.raises(ValueError, match="2 prompts need as many images"):
        save_grid(tmp_path / "grid.png", ["a", "b"], flat(0.1), flat(0.1))
    assert not list(tmp_path.iterdir())
