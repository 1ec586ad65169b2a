"""Trains the shared autoencoder by the clock, then caches the latents of the training scenes.

Writes OUT/vae (saved model), OUT/vae.png (drawings above their reconstructions) and OUT/latents.pt.
With --polish it goes on with the decoder alone: the encoder, and so every cached latent, stays as it is.
"""

import argparse
import math
import time
from pathlib import Path

import models
import numpy as np
import scenes
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional

KL_WEIGHT = 2e-4  # per latent number; the picture error is per pixel number
NOISE = 0.05  # of the deviation of a latent, while the decoder is polished


def to_tensor(pixels):
    """uint8 (batch, 64, 64, 3) -> float (batch, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images):
    """The inverse of `to_tensor`, clamped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).byte().numpy()


def train(minutes, batch, rate):
    """An autoencoder trained on fresh scenes for `minutes`."""
    torch.manual_seed(0)
    vae = models.vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-3)
    pool, _ = scenes.dataset(20000, seed=1, share_of_pairs=0.5)
    generator, begin, step = np.random.default_rng(0), time.time(), 0
    while (spent := (time.time() - begin) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * spent))
        x = to_tensor(pool[generator.integers(len(pool), size=batch)]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        error = (y - x).abs().mean() + 2 * (y - x).square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            psnr = 10 * math.log10(4 / (y - x).square().mean().item())
            print(f"step {step} spent {spent:.2f} psnr {psnr:.1f} kl {kl.item():.2f}", flush=True)
        step += 1
    return vae.to(memory_format=torch.contiguous_format).eval()


def outlines(x):
    """Weights (batch, 1, 64, 64) that are five times larger within 3 pixels of an outline of an object."""
    across = (x[:, :, :, 1:] - x[:, :, :, :-1]).abs().amax(1, keepdim=True)
    down = (x[:, :, 1:] - x[:, :, :-1]).abs().amax(1, keepdim=True)
    edge = functional.pad(across, (0, 1, 0, 0)).maximum(functional.pad(down, (0, 0, 0, 1)))
    return 1 + 4 * functional.max_pool2d((edge > 0.2).float(), 7, 1, 3)


def polish(vae, minutes, batch, rate, seed):
    """The decoder trained on for `minutes` after the frozen encoder, with latents as noisy as a denoiser's."""
    vae = vae.to(memory_format=torch.channels_last)
    weights = list(vae.decoder.parameters())
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3)
    pool, _ = scenes.dataset(20000, seed=seed, share_of_pairs=0.5)
    generator, begin, step = np.random.default_rng(seed), time.time(), 0
    while (spent := (time.time() - begin) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * spent))
        x = to_tensor(pool[generator.integers(len(pool), size=batch)]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mean
                z = z + NOISE / vae.config.scaling_factor * torch.randn_like(z)
            y = vae.decode(z).sample.float()
        error = ((y - x).abs() + 2 * (y - x).square()) * outlines(x)
        optimizer.zero_grad()
        error.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 50 == 0:
            psnr = 10 * math.log10(4 / (y - x).square().mean().item())
            print(f"decoder step {step} spent {spent:.2f} psnr {psnr:.1f}", flush=True)
        step += 1
    return vae.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def encode(vae, pixels, batch=64):
    """uint8 (n, 64, 64, 3) -> posterior means, unscaled, bfloat16 (n, 4, 16, 16)."""
    chunks = []
    for at in range(0, len(pixels), batch):
        with torch.autocast("cpu", torch.bfloat16):
            chunks.append(vae.encode(to_tensor(pixels[at : at + batch])).latent_dist.mean)
    return torch.cat(chunks).bfloat16()


@torch.no_grad()
def picture(vae, path):
    """A sheet: rows of drawings, each above its reconstruction."""
    pixels, _ = scenes.dataset(32, seed=99)
    again = to_pixels(vae.decode(vae.encode(to_tensor(pixels)).latent_dist.mean).sample)
    psnr = 10 * math.log10(255**2 / np.square(pixels.astype(float) - again).mean())
    rows = [np.concatenate(list(x[at : at + 8]), 1) for at in range(0, 32, 8) for x in (pixels, again)]
    Image.fromarray(np.concatenate(rows)).resize((1536, 1536), Image.Resampling.NEAREST).save(path)
    print(f"psnr {psnr:.1f} dB", flush=True)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path("runs/zoo"))
    arguments.add_argument("--minutes", type=float, default=8)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--rate", type=float, default=2e-3)
    arguments.add_argument("--scenes", type=int, default=40000)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--polish", action="store_true", help="train the decoder of OUT/vae on")
    arguments.add_argument("--latents-of", type=Path, help="train nothing, cache latents of this saved autoencoder")
    arguments.add_argument("--seed", type=int, default=2, help="of the scenes to polish with")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)

    if options.polish:
        vae = AutoencoderKL.from_pretrained(options.out / "vae")
        vae = polish(vae, options.minutes, options.batch, options.rate, options.seed)
        vae.save_pretrained(options.out / "vae")
        picture(vae, options.out / "vae.png")
        return

    pixels, captions = scenes.dataset(options.scenes)
    if options.latents_of:
        vae = AutoencoderKL.from_pretrained(options.latents_of, torch_dtype=torch.float32).eval()
        vae.save_pretrained(options.out / "vae")
        torch.save({"latents": encode(vae, pixels), "captions": captions}, options.out / "latents.pt")
        return

    vae = train(options.minutes, options.batch, options.rate)
    latents = encode(vae, pixels)
    # Per-pipeline code subtracts the shift and multiplies by the factor: latents of mean 0 and variance 1.
    shift, scale = latents.float().mean().item(), 1 / latents.float().std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    vae.save_pretrained(options.out / "vae")
    torch.save({"latents": latents, "captions": captions}, options.out / "latents.pt")
    deviation = latents.float().std((0, 2, 3)).mul(scale).tolist()
    print(f"shift {shift:.3f} scale {scale:.3f} deviation by channel {deviation}")
    picture(AutoencoderKL.from_pretrained(options.out / "vae"), options.out / "vae.png")


if __name__ == "__main__":
    main()
