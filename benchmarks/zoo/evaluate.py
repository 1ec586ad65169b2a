"""Samples held-out captions with an exported pipeline and judges the pictures; checks the judge itself first.

Writes benchmarks/results/zoo_<name>.json; OUT/<name>_held_out.png and OUT/<name>_trained.png to look at.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import models
import numpy as np
import scenes
import torch
from judge import judge
from train_vae import to_pixels, to_tensor
from training import draw_sheet, quiet, sample

from dcc import demo

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BARS = {"mmdit": 0.90, "unet": 0.85}
CLARITIES = (0.62, 0.70, 0.75)  # overlaps with a template from which a shape counts; the first is the judge's own
ASPECTS = ("followed", "shape", "colour", "place", "size", "background")


def shares(verdicts):
    """Share of the verdicts, in [0, 1], that hold in each aspect."""
    return {aspect: round(float(np.mean([getattr(v, aspect) for v in verdicts])), 4) for aspect in ASPECTS}


def judged(images, chosen):
    """Verdicts, and a table of shares by kind of scene."""
    verdicts = [judge(image, scene) for image, scene in zip(images, chosen, strict=True)]
    kinds = {
        "all": lambda scene: True,
        "one_object": lambda scene: len(scene.objects) == 1,
        "two_objects": lambda scene: len(scene.objects) == 2,
        "unseen_shape_colour": lambda scene: scene.unseen,
        "unseen_arrangement": lambda scene: scene.held_out and not scene.unseen,
    }
    table = {}
    for kind, belongs in kinds.items():
        group = [v for v, scene in zip(verdicts, chosen, strict=True) if belongs(scene)]
        if group:
            table[kind] = {"images": len(group)} | shares(group)
    return verdicts, table


def by_clarity(images, chosen):
    """Share of the pictures that follow their captions when the judge asks for clearer and clearer shapes."""
    return {
        str(clear): round(float(np.mean([judge(i, s, clear).followed for i, s in zip(images, chosen, strict=True)])), 4)
        for clear in CLARITIES
    }


@torch.no_grad()
def check_judge(vae, count=500):
    """The judge on drawings after the autoencoder's round trip: table and PSNR in dB."""
    rng = random.Random(7)
    chosen = scenes.trained_scenes(count // 2, seed=3000) + scenes.held_out_scenes(count - count // 2, seed=3001)
    pixels = np.stack([scenes.draw(scene, rng) for scene in chosen])
    again = [
        to_pixels(vae.decode(vae.encode(to_tensor(pixels[at : at + 50])).latent_dist.mean).sample)
        for at in range(0, count, 50)
    ]
    again = np.concatenate(again)
    psnr = 10 * np.log10(255**2 / np.square(pixels.astype(float) - again).mean())
    table = judged(list(again), chosen)[1]
    return table | {"psnr": round(float(psnr), 2), "followed_by_clarity": by_clarity(again, chosen)}


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("name", choices=list(BARS))
    arguments.add_argument("--out", type=Path, default=Path("runs/zoo"))
    arguments.add_argument("--images", type=int, default=200)
    arguments.add_argument("--guidance", type=float, help="instead of the default (unet only)")
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    quiet()
    pipe = demo.load(options.name)
    changes = {} if options.guidance is None else {"guidance_scale": options.guidance}
    report = {"name": options.name, "call": models.CALL[options.name] | changes, "bar": BARS[options.name]}
    report["judge_on_autoencoded_drawings"] = check_judge(pipe.vae)
    print(json.dumps(report, indent=1), flush=True)
    for split, chosen in (
        ("held_out", scenes.held_out_scenes(options.images)),
        ("trained", scenes.trained_scenes(options.images // 4)),
    ):
        images = sample(pipe, options.name, chosen, seed=10_000, **changes)
        verdicts, report[split] = judged(images, chosen)
        draw_sheet(images[:100], chosen[:100], verdicts[:100], options.out / f"{options.name}_{split}.png")
        report[split]["followed_by_clarity"] = by_clarity(images, chosen)
        missed = [(s.caption, v.seen) for s, v in zip(chosen, verdicts, strict=True) if not v.followed]
        report[split]["missed_objects"] = dict(Counter(f"{len(seen)} seen" for _, seen in missed))
        print(json.dumps({split: report[split]}, indent=1), flush=True)
    report["bar_reached"] = report["held_out"]["all"]["followed"] >= BARS[options.name]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"zoo_{options.name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
