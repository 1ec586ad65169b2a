"""Says from the pixels alone whether a picture shows what its caption says."""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import scenes
from PIL import Image, ImageDraw

LEAST_AREA = 20  # pixels; smaller blobs are ignored
TEMPLATE = 32
CLEAR = 0.62  # overlap with the best template below which a shape is none of the four


@dataclass
class Verdict:
    """Which parts of the caption the picture follows, and what was seen as (shape, colour, x, y, radius)."""

    shape: bool = False
    colour: bool = False
    place: bool = False  # or relation
    size: bool = False  # true of two-object scenes, whose captions name none
    background: bool = False
    seen: list = field(default_factory=list)

    @property
    def followed(self):
        """Every object with its own colour, in its place or relation, and nothing else in the picture."""
        return self.shape and self.colour and self.place


def components(mask):
    """Boolean masks of the 4-connected parts of `mask`, largest first."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        spread = np.where(mask, np.maximum.reduce((labels, *around)), 0)
        if (spread == labels).all():
            break
        labels = spread
    names, areas = np.unique(labels[labels > 0], return_counts=True)
    return [labels == name for name, area in sorted(zip(names, areas, strict=True), key=lambda p: -p[1])]


def nearest(colour, palette):
    return min(palette, key=lambda name: np.square(np.subtract(palette[name], colour)).sum())


def normalized(mask):
    """The part of a mask inside its bounding box, as floats (32, 32)."""
    ys, xs = np.nonzero(mask)
    crop = Image.fromarray(mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].astype(np.uint8) * 255)
    return np.asarray(crop.resize((TEMPLATE, TEMPLATE), Image.Resampling.BOX), dtype=np.float32) / 255


@cache
def templates():
    """Each shape drawn alone, normalized."""
    result = {}
    for shape in scenes.SHAPES:
        image = Image.new("L", (4 * scenes.SIDE, 4 * scenes.SIDE), 0)
        pen = ImageDraw.Draw(image)
        scenes.paint(pen, shape, 255, 32, 32, 14)
        result[shape] = normalized(np.asarray(image) > 127)
    return result


def overlap(a, b):
    """Soft intersection over union."""
    return np.minimum(a, b).sum() / np.maximum(a, b).sum()


def look(image, clear=CLEAR):
    """(background name, [(shape, colour, x, y, radius), ...]) seen in uint8 (64, 64, 3)."""
    pixels = image.astype(np.float32)
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    ground = np.median(frame, 0)
    far = np.linalg.norm(pixels - ground, axis=-1)
    seen = []
    for part in components(far > 50):
        if part.sum() < LEAST_AREA:
            continue
        # Its own colour is that of the pixels farthest from the background; half way is the outline.
        core = part & (far >= np.median(far[part]))
        colour = np.median(pixels[core], 0)
        solid = part & (far > 0.5 * np.linalg.norm(colour - ground))
        if solid.sum() < LEAST_AREA:
            continue
        ys, xs = np.nonzero(solid)
        form = normalized(solid)
        scores = {shape: overlap(form, template) for shape, template in templates().items()}
        shape = max(scores, key=scores.get)
        if scores[shape] < clear:
            shape = "unclear"
        x, y = (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2
        radius = (xs.max() - xs.min() + ys.max() - ys.min() + 2) / 4
        seen.append((shape, nearest(colour, scenes.COLOURS), float(x), float(y), float(radius)))
    return nearest(ground, scenes.BACKGROUNDS), seen


def judge(image, scene, clear=CLEAR):
    """The verdict on uint8 (64, 64, 3) for a scene."""
    background, seen = look(image, clear)
    verdict = Verdict(background=background == scene.background, seen=seen)
    if len(seen) != len(scene.objects):
        return verdict
    if len(seen) == 1:
        _, _, x, y, radius = seen[0]
        place = min(scenes.PLACES, key=lambda name: np.hypot(*np.subtract(scenes.PLACES[name], (x, y))))
        size = min(scenes.RADII, key=lambda name: abs(scenes.RADII[name] - radius))
        verdict.place, verdict.size = place == scene.where, size == scene.size
    else:
        # Which blob is the first object follows from the relation; shapes and colours must then agree with it.
        (_, _, ax, ay, _), (_, _, bx, by, _) = seen
        upright = abs(ay - by) > abs(ax - bx)
        verdict.place = upright == (scene.where in ("above", "below"))
        verdict.size = True
        along = 3 if scene.where in ("above", "below") else 2
        verdict.seen = seen = sorted(seen, key=lambda s: s[along], reverse=scene.where in ("below", "right of"))
    verdict.shape = all(s[0] == shape for s, (shape, _) in zip(seen, scene.objects, strict=True))
    verdict.colour = all(s[1] == colour for s, (_, colour) in zip(seen, scene.objects, strict=True))
    return verdict
