"""Trains the U-Net with its text encoder on cached latents; one caption in ten is dropped for guidance.

Stop it at any time; started again it goes on from OUT/unet.pt.
"""

import argparse
from pathlib import Path

import models
import torch
from diffusers import AutoencoderKL
from training import Trainer, quiet

DROPPED = 0.1


def loss(parts, x, ids, weight):
    """Weighted mean squared error of v = sqrt(a) noise - sqrt(1 - a) x; noisy times come more often."""
    scheduler = parts["scheduler"]
    noise = torch.randn_like(x)
    last = scheduler.config.num_train_timesteps
    earliest = torch.where(torch.rand(x.shape[0]) < 0.5, 0.0, 0.5)
    time = ((earliest + (1 - earliest) * torch.rand(x.shape[0])) * last).long().clamp(max=last - 1)
    empty = torch.tensor([models.END] + [models.PAD] * (ids.shape[1] - 1))
    ids = torch.where(torch.rand(ids.shape[0], 1) < DROPPED, empty, ids)
    velocity = parts["unet"](
        scheduler.add_noise(x, noise, time),
        time,
        encoder_hidden_states=parts["text_encoder"](ids)[0],
        return_dict=False,
    )[0]
    return (weight * (velocity.float() - scheduler.get_velocity(x, noise, time)).square()).mean()


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path("runs/zoo"))
    arguments.add_argument("--minutes", type=float, default=100, help="in all, resumed time included")
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--rate", type=float, default=8e-4)
    arguments.add_argument("--pairs", type=float, default=0.4, help="share of two-object scenes")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--fresh", action="store_true", help="ignore the checkpoint")
    arguments.add_argument("--begin-with", type=Path, nargs="*", default=[], help="folders of weights to start from")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    quiet()
    vae = AutoencoderKL.from_pretrained(options.out / "vae").eval()
    Trainer("unet", vae, options.out, options).run(loss)


if __name__ == "__main__":
    main()
