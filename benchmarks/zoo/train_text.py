"""Teaches the text encoders of "mmdit" to read, before they are trained along with its transformer.

Under the state of every token, linear probes must say which background there is, and, for the words of an object, its
shape, colour, size and where in the picture it stands: which words belong together, and what their order means. Drawn
pictures teach that too, but slowly. The pooled state must say all of it at once. The probes are thrown away.
"""

import argparse
import random
from pathlib import Path

import models
import scenes
import torch
from torch import nn
from training import quiet
from transformers import CLIPTextModel, T5EncoderModel

SIZES = (*scenes.RADII, "")  # two-object captions name none
SPOTS = (*scenes.PLACES, "top", "bottom", "left", "right")
RELATION_SPOTS = {
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
    "left of": ("left", "right"),
    "right of": ("right", "left"),
}
FIELDS = {"shape": scenes.SHAPES, "colour": tuple(scenes.COLOURS), "size": SIZES, "spot": SPOTS}
IGNORED = -100  # of cross entropy


def spots(scene):
    """Where in the picture each object stands."""
    return RELATION_SPOTS.get(scene.where, (scene.where,))


def facts(scene, index):
    """What is true of one object, as a class number per field."""
    shape, colour = scene.objects[index]
    values = (shape, colour, scene.size, spots(scene)[index])
    return [names.index(value) for names, value in zip(FIELDS.values(), values, strict=True)]


def token_labels(scene):
    """(16, 5) class numbers for each token: background, then the fields of the object that the word belongs to."""
    background = list(scenes.BACKGROUNDS).index(scene.background)
    words = scene.caption.split()
    labels = [[background, *[IGNORED] * len(FIELDS)] for _ in words]
    ends = [at for at, word in enumerate(words) if word in scenes.SHAPES]
    for index, end in enumerate(ends):
        begin = end - (3 if scene.size else 2)
        for at in range(begin, end + 1):
            labels[at][1:] = facts(scene, index)
    labels += [[IGNORED] * (1 + len(FIELDS))] * (models.TOKENS - len(words))
    return labels


def scene_labels(scene):
    """Class numbers of the whole scene: background, relation or place, then shape and colour of each object.

    Objects are in the order of the picture, from the top or the left.
    """
    order = sorted(range(len(scene.objects)), key=lambda index: spots(scene)[index] in ("bottom", "right"))
    labels = [list(scenes.BACKGROUNDS).index(scene.background), SIZES.index(scene.size)]
    labels.append(SPOTS.index(spots(scene)[order[0]]))
    for place in range(2):
        shape_colour = facts(scene, order[place])[:2] if place < len(order) else [IGNORED] * 2
        labels += shape_colour
    return labels


class Probes(nn.Module):
    """Linear classifiers of (..., width) states; `classes` lists how many classes each label column has."""

    def __init__(self, width, classes):
        super().__init__()
        self.classes = classes
        self.linear = nn.Linear(width, sum(classes))

    def forward(self, states, labels):
        """(mean cross entropy, share of the labels that are right)."""
        losses, right, count = [], 0, 0
        for column, scores in enumerate(self.linear(states).split(self.classes, -1)):
            wanted = labels[..., column]
            losses.append(nn.functional.cross_entropy(scores.flatten(0, -2), wanted.flatten(), ignore_index=IGNORED))
            known = wanted != IGNORED
            right += (scores.argmax(-1) == wanted)[known].sum().item()
            count += known.sum().item()
        return torch.stack(losses).mean(), right / count


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path("runs/zoo"), help="written to OUT/read")
    arguments.add_argument("--steps", type=int, default=1500)
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--rate", type=float, default=1e-3)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--begin-with", type=Path, help="a saved pipeline whose text encoders to start from")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    quiet()
    rng = random.Random(5)
    tokenizer = models.tokenizer()
    t5, clip = models.t5(), models.clip(1)
    if options.begin_with:
        t5 = T5EncoderModel.from_pretrained(options.begin_with / "text_encoder_2").float()
        clip = CLIPTextModel.from_pretrained(options.begin_with / "text_encoder").float()
    counts = [len(scenes.BACKGROUNDS), *[len(names) for names in FIELDS.values()]]
    of_tokens = Probes(models.T5_WIDTH, counts)
    pair = [len(scenes.SHAPES), len(scenes.COLOURS)]
    of_scene = Probes(models.CLIP_WIDTH, [len(scenes.BACKGROUNDS), len(SIZES), len(SPOTS), *pair, *pair])
    weights = [w for module in (t5, clip, of_tokens, of_scene) for w in module.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=options.rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, options.steps, pct_start=0.1)
    for step in range(options.steps):
        chosen = [scenes.training(rng, 0.6) for _ in range(options.batch)]
        encoded = tokenizer([s.caption for s in chosen], padding="max_length", max_length=models.TOKENS)
        ids = torch.tensor(encoded.input_ids)
        words, words_right = of_tokens(t5(ids)[0], torch.tensor([token_labels(s) for s in chosen]))
        whole, whole_right = of_scene(clip(ids).pooler_output, torch.tensor([scene_labels(s) for s in chosen]))
        optimizer.zero_grad()
        (words + whole).backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == options.steps - 1:
            print(f"step {step} words {words:.3f} {words_right:.1%} scene {whole:.3f} {whole_right:.1%}", flush=True)
    t5.save_pretrained(options.out / "read" / "text_encoder_2")
    clip.save_pretrained(options.out / "read" / "text_encoder")


if __name__ == "__main__":
    main()
