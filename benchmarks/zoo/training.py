"""What the two denoiser trainings share: a schedule by the clock, averaged weights, checkpoints, sample sheets."""

import contextlib
import logging
import math
import os
import random
import time
from pathlib import Path

import models
import numpy as np
import scenes
import torch
from judge import judge
from muon import optimizers
from PIL import Image, ImageDraw

WARM_UP = 0.02  # shares of the training time
DECAY_FROM = 0.75
BOOST = 6.0  # weight of the error where the objects are
EMA = 0.999
SAVE_EVERY, SHEET_EVERY = 180.0, 900.0  # seconds


def plain_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention as two matrix products: twice as fast to train on a CPU as the fused call at 80 tokens."""
    scores = (query * (scale or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    if attn_mask is not None:
        scores = scores + attn_mask if attn_mask.is_floating_point() else scores.masked_fill(~attn_mask, -math.inf)
    return scores.softmax(-1).to(value.dtype) @ value


@contextlib.contextmanager
def matmul_attention():
    """Replaces the fused attention inside the block."""
    fused = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = plain_attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = fused


def rate(spent):
    """Learning-rate factor at a share of the time: warm-up, constant, linear decay to zero."""
    return min(1.0, spent / WARM_UP + 0.02) * min(1.0, max(0.0, (1 - spent) / (1 - DECAY_FROM)))


def region(caption):
    """Weights (1, 16, 16) of mean one, larger where the caption says an object is.

    They depend on the caption alone, so the best prediction stays the same; shapes, a small part of the error, count
    more: without them colours and places are learned, shapes hardly.
    """
    weight = torch.ones(1, 16, 16)
    for x, y, half in scenes.boxes(caption):
        left, top, right, bottom = (max(0, round(v / 4)) for v in (x - half, y - half, x + half, y + half))
        weight[:, top:bottom, left:right] = BOOST
    return weight / weight.mean()


class Latents:
    """The cached scenes: latents of mean 0 and variance 1, token ids, and weights of the error."""

    def __init__(self, out, vae, tokenizer):
        cache = torch.load(out / "latents.pt")
        self.x = ((cache["latents"].float() - vae.config.shift_factor) * vae.config.scaling_factor).bfloat16()
        encoded = tokenizer(cache["captions"], padding="max_length", max_length=models.TOKENS, truncation=True)
        self.ids = torch.tensor(encoded.input_ids)
        regions = {}  # shared by the captions that name the same boxes
        for caption in cache["captions"]:
            regions.setdefault(str(scenes.boxes(caption)), (len(regions), region(caption)))
        self.regions = torch.stack([weight for _, weight in regions.values()])
        self.region = torch.tensor([regions[str(scenes.boxes(caption))][0] for caption in cache["captions"]])
        self.pairs = torch.tensor([" at the " not in caption for caption in cache["captions"]])

    def batch(self, size, share_of_pairs, generator):
        """Latents (size, 4, 16, 16), ids (size, 16), weights (size, 1, 16, 16); `share_of_pairs` show two objects."""
        chance = torch.where(self.pairs, share_of_pairs / self.pairs.float().mean(), 0.0)
        chance += torch.where(self.pairs, 0.0, (1 - share_of_pairs) / (~self.pairs).float().mean())
        index = torch.multinomial(chance, size, replacement=True, generator=generator)
        return self.x[index].float(), self.ids[index], self.regions[self.region[index]]


class Trainer:
    """Runs `loss(parts, x, ids, weight)` by the clock on the trained parts; resumes from OUT/<name>.pt."""

    def __init__(self, name, vae, out, options):
        self.name, self.out, self.options = name, Path(out), options
        self.parts = models.parts(name, vae)
        self.modules = {key: self.parts[key] for key in models.TRAINED[name]}
        for module in self.modules.values():
            module.train()
        self.weights = [w for module in self.modules.values() for w in module.parameters()]
        self.mean = [w.detach().clone() for w in self.weights]
        self.optimizers = optimizers(self.modules.values(), options.rate)
        self.step, self.elapsed, self.generator = 0, 0.0, torch.Generator().manual_seed(1)
        self.data = Latents(self.out, vae, self.parts["tokenizer"])
        self.file = self.out / f"{name}.pt"
        if self.file.exists() and not options.fresh:
            self.resume()
        else:
            for folder in options.begin_with:
                self.begin_with(folder)

    def begin_with(self, folder):
        """The weights of those parts that a folder holds, without their optimizer's state."""
        for key, module in self.modules.items():
            if (folder / key).exists():
                module.load_state_dict(type(module).from_pretrained(folder / key).float().state_dict())
        self.mean = [w.detach().clone() for w in self.weights]

    def resume(self):
        state = torch.load(self.file)
        for key, module in self.modules.items():
            module.load_state_dict(state["modules"][key])
        self.mean = state["mean"]
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.generator.manual_seed(self.step)
        print(f"resumed at step {self.step}, {self.elapsed / 60:.1f} minutes", flush=True)

    def save(self):
        state = {
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "mean": self.mean,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "batch": self.options.batch,
            "step": self.step,
            "elapsed": self.elapsed,
        }
        temporary = self.file.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.file)

    @contextlib.contextmanager
    def averaged(self):
        """Swaps the averaged weights in."""
        kept = [w.detach().clone() for w in self.weights]
        self.assign(self.mean)
        try:
            yield
        finally:
            self.assign(kept)

    @torch.no_grad()
    def assign(self, values):
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)

    def update(self, loss):
        """One optimizer step and one averaging step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.options.rate * rate(self.elapsed / (60 * self.options.minutes))
            optimizer.step()
        decay = min(EMA, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.mean, [w.detach() for w in self.weights], 1 - decay)
        self.step += 1
        return norm

    def run(self, loss):
        options = self.options
        recent = []
        last = saved = drawn = time.time()
        while self.elapsed < 60 * options.minutes:
            x, ids, weight = self.data.batch(options.batch, options.pairs, self.generator)
            with matmul_attention(), torch.autocast("cpu", torch.bfloat16):
                value = loss(self.parts, x, ids, weight)
            norm = self.update(value)
            recent.append(value.item())
            now = time.time()
            self.elapsed, last = self.elapsed + now - last, now
            if self.step % 25 == 0:
                mean = sum(recent) / len(recent)
                per_step = f"{self.elapsed / self.step:.2f} s per step"
                head = f"step {self.step} {self.elapsed / 60:.1f} min {per_step}"
                print(f"{head} loss {mean:.4f} norm {norm:.2f}", flush=True)
                recent = []
            if now - saved > SAVE_EVERY:
                self.save()
                saved = time.time()
            if now - drawn > SHEET_EVERY:
                self.sheet()
                drawn = time.time()
        self.save()
        self.sheet()

    def sheet(self, count=40):
        """Samples held-out captions with the averaged weights, logs how many are followed, writes OUT/<name>.png."""
        chosen = scenes.held_out_scenes(count)
        for module in self.modules.values():
            module.eval()
        with self.averaged():
            images = sample(models.pipeline(self.name, self.parts), self.name, chosen)
        for module in self.modules.values():
            module.train()
        verdicts = [judge(image, scene) for image, scene in zip(images, chosen, strict=True)]
        for kind in (1, 2):
            good = [v.followed for v, s in zip(verdicts, chosen, strict=True) if len(s.objects) == kind]
            print(f"  {kind} object(s): {sum(good)} of {len(good)} followed", flush=True)
        draw_sheet(images, chosen, verdicts, self.out / f"{self.name}.png")


def sample(pipe, name, chosen, batch=20, seed=0, **changes):
    """One image per scene, uint8 (64, 64, 3), each from its own noise whatever the batch."""
    pipe.set_progress_bar_config(disable=True)
    images = []
    for at in range(0, len(chosen), batch):
        captions = [scene.caption for scene in chosen[at : at + batch]]
        noise = [torch.Generator().manual_seed(seed + at + i) for i in range(len(captions))]
        with torch.no_grad():
            result = pipe(captions, generator=noise, output_type="np", **models.CALL[name] | changes)
        images += list((result.images * 255).round().astype(np.uint8))
    return images


def draw_sheet(images, chosen, verdicts, path, columns=10):
    """A captioned contact sheet; captions that were not followed are red."""
    cell, text = 128, 46
    rows = math.ceil(len(images) / columns)
    page = Image.new("RGB", (columns * cell, rows * (cell + text)), "white")
    pen = ImageDraw.Draw(page)
    for i, (image, scene, verdict) in enumerate(zip(images, chosen, verdicts, strict=True)):
        x, y = i % columns * cell, i // columns * (cell + text)
        page.paste(Image.fromarray(image).resize((cell - 4, cell - 4), Image.Resampling.NEAREST), (x, y))
        words = scene.caption.split()
        lines = "\n".join(" ".join(words[at : at + 4]) for at in range(0, len(words), 4))
        pen.multiline_text((x, y + cell - 4), lines, fill="black" if verdict.followed else "red", spacing=0)
    page.save(path)


def quiet():
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    random.seed(0)
