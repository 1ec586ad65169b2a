"""Captioned 64 x 64 scenes: one or two coloured shapes on a plain, softly shaded background.

One object:  "a small red circle at the top left on a white background"
Two objects: "a red circle above a blue square on a grey background"
"""

import random
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
OVERSAMPLE = 4
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (40, 170, 70),
    "blue": (50, 80, 225),
    "purple": (155, 55, 190),
}
BACKGROUNDS = {"white": (240, 240, 240), "grey": (140, 140, 140), "black": (22, 22, 22), "brown": (105, 70, 45)}
RADII = {"small": 8.0, "large": 14.0}
PAIR_RADIUS = 10.0  # both objects of a two-object scene; their captions name no size
PLACES = {  # centre (x, y) in pixels
    "top left": (18, 18),
    "top right": (46, 18),
    "center": (32, 32),
    "bottom left": (18, 46),
    "bottom right": (46, 46),
}
RELATIONS = {  # centres of the first and the second object
    "above": ((32, 17), (32, 47)),
    "below": ((32, 47), (32, 17)),
    "left of": ((17, 32), (47, 32)),
    "right of": ((47, 32), (17, 32)),
}
# Never drawn for training, alone or in company: every shape and four of the colours lose one partner.
UNSEEN = {("circle", "purple"), ("square", "orange"), ("triangle", "blue"), ("cross", "green")}
WORDS = sorted(
    {word for text in (*SHAPES, *COLOURS, *BACKGROUNDS, *RADII, *PLACES, *RELATIONS) for word in text.split()}
    | set("a an at the on background".split())
)


@dataclass(frozen=True)
class Scene:
    """What a caption says. `objects` holds one or two (shape, colour); `where` is a place or a relation."""

    objects: tuple
    where: str
    background: str
    size: str = ""

    @property
    def caption(self):
        ending = f"on a {self.background} background"
        if len(self.objects) == 1:
            shape, colour = self.objects[0]
            return f"a {self.size} {colour} {shape} at the {self.where} {ending}"
        names = [f"{'an' if colour[0] == 'o' else 'a'} {colour} {shape}" for shape, colour in self.objects]
        return f"{names[0]} {self.where} {names[1]} {ending}"

    @property
    def unseen(self):
        """True if it shows a (shape, colour) that no training scene shows."""
        return any(pair in UNSEEN for pair in self.objects)

    @property
    def held_out(self):
        """True if training never shows this: an unseen pair, or one arrangement in ten on any background."""
        objects, where = self.objects, self.where
        if where in ("below", "right of"):  # "a below b" is the same picture as "b above a"
            objects, where = objects[::-1], {"below": "above", "right of": "left of"}[where]
        return self.unseen or zlib.crc32(repr((objects, where, self.size)).encode()) % 10 == 0


def sample(rng, count):
    """A random scene of `count` objects, held out or not; two objects never share a colour."""
    colours = rng.sample(list(COLOURS), count)
    objects = tuple((rng.choice(SHAPES), colour) for colour in colours)
    background = rng.choice(list(BACKGROUNDS))
    if count == 1:
        return Scene(objects, rng.choice(list(PLACES)), background, rng.choice(list(RADII)))
    return Scene(objects, rng.choice(list(RELATIONS)), background)


def training(rng, share_of_pairs=0.4):
    """A random scene that is not held out."""
    count = 2 if rng.random() < share_of_pairs else 1
    while (scene := sample(rng, count)).held_out:
        pass
    return scene


def outline(shape, x, y, r):
    """Polygons (lists of points) of a shape centred at (x, y); a circle is its bounding box."""
    if shape == "circle":
        return [(x - r, y - r, x + r, y + r)]
    if shape == "square":
        s = 0.88 * r
        return [[(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]]
    if shape == "triangle":
        return [[(x, y - r), (x + 1.1 * r, y + 0.9 * r), (x - 1.1 * r, y + 0.9 * r)]]
    w = 0.34 * r
    return [
        [(x - r, y - w), (x + r, y - w), (x + r, y + w), (x - r, y + w)],
        [(x - w, y - r), (x + w, y - r), (x + w, y + r), (x - w, y + r)],
    ]


def paint(draw, shape, colour, x, y, r):
    """Fills one shape; lengths in pixels of the final image."""
    for polygon in outline(shape, *(OVERSAMPLE * v for v in (x, y, r))):
        (draw.ellipse if shape == "circle" else draw.polygon)(polygon, fill=colour)


def draw(scene, rng):
    """A picture of the scene, uint8 (64, 64, 3), with a little jitter of position, size and shading."""
    big = SIDE * OVERSAMPLE
    image = Image.new("RGB", (big, big), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    if len(scene.objects) == 1:
        centres, radius = [PLACES[scene.where]], RADII[scene.size]
    else:
        centres, radius = RELATIONS[scene.where], PAIR_RADIUS
    for (shape, colour), (x, y) in zip(scene.objects, centres, strict=True):
        jitter = 2.5
        paint(
            canvas,
            shape,
            COLOURS[colour],
            x + rng.uniform(-jitter, jitter),
            y + rng.uniform(-jitter, jitter),
            radius * rng.uniform(0.93, 1.07),
        )
    pixels = np.asarray(image.reduce(OVERSAMPLE), dtype=np.float32)
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    shade = rng.uniform(-8, 8) * ramp[:, None, None] + rng.uniform(-8, 8) * ramp[None, :, None]
    return np.clip(pixels + shade, 0, 255).round().astype(np.uint8)


def boxes(caption):
    """Where its objects lie, jitter included, as (x, y, half a side) in pixels; known from the words alone."""
    if " at the " in caption:
        place = next(name for name in PLACES if f"at the {name} " in caption)
        return [(*PLACES[place], RADII[caption.split()[1]] + 3)]
    relation = next(name for name in RELATIONS if f" {name} " in caption)
    return [(x, y, PAIR_RADIUS + 3) for x, y in RELATIONS[relation]]


def dataset(count, seed=0, share_of_pairs=0.4):
    """`count` training scenes: pictures uint8 (count, 64, 64, 3) and their captions."""
    rng = random.Random(seed)
    scenes = [training(rng, share_of_pairs) for _ in range(count)]
    return np.stack([draw(scene, rng) for scene in scenes]), [scene.caption for scene in scenes]


def held_out_scenes(count, seed=1000):
    """Distinct held-out scenes: of every ten, six of one object and four of two; half show an unseen pair."""
    rng = random.Random(seed)
    scenes = []
    while len(scenes) < count:
        place = len(scenes) % 10
        objects = 2 if place % 5 in (1, 3) else 1
        unseen = (place + len(scenes) // 10) % 2 == 0
        scene = sample(rng, objects)
        if scene.held_out and scene.unseen == unseen and scene not in scenes:
            scenes.append(scene)
    return scenes


def trained_scenes(count, seed=2000):
    """Distinct scenes of the trained kind, mixed like `held_out_scenes`."""
    rng = random.Random(seed)
    scenes = []
    while len(scenes) < count:
        scene = sample(rng, 2 if len(scenes) % 5 in (1, 3) else 1)
        if not scene.held_out and scene not in scenes:
            scenes.append(scene)
    return scenes
