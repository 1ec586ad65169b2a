"""Trains the Flux transformer with its two text encoders, by flow matching on cached latents.

Stop it at any time; started again it goes on from OUT/mmdit.pt.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from training import Trainer, quiet

IMAGE_IDS = FluxPipeline._prepare_latent_image_ids(1, 8, 8, torch.device("cpu"), torch.float32)


def pack(x):
    """(batch, 4, 16, 16) -> tokens of 2 x 2 latent pixels (batch, 64, 16)."""
    return FluxPipeline._pack_latents(x, x.shape[0], 4, 16, 16)


def times(count):
    """Half of them logit-normal, half in the noisiest quarter: there the caption decides what the shapes will be."""
    usual = (torch.randn(count) + 0.5).sigmoid()
    return torch.where(torch.rand(count) < 0.5, usual, 1 - 0.25 * torch.rand(count))


def loss(parts, x, ids, weight):
    """Weighted mean squared error of the velocity noise - x."""
    x, weight = pack(x), pack(weight.expand_as(x))
    noise = torch.randn_like(x)
    time = times(x.shape[0])
    mix = time[:, None, None]
    velocity = parts["transformer"](
        hidden_states=(1 - mix) * x + mix * noise,
        encoder_hidden_states=parts["text_encoder_2"](ids)[0],
        pooled_projections=parts["text_encoder"](ids).pooler_output,
        timestep=time,
        img_ids=IMAGE_IDS,
        txt_ids=torch.zeros(ids.shape[1], 3),
        return_dict=False,
    )[0]
    return (weight * (velocity.float() - (noise - x)).square()).mean()


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path("runs/zoo"))
    arguments.add_argument("--minutes", type=float, default=100, help="in all, resumed time included")
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--rate", type=float, default=1e-3)
    arguments.add_argument("--pairs", type=float, default=0.4, help="share of two-object scenes")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--fresh", action="store_true", help="ignore the checkpoint")
    arguments.add_argument("--begin-with", type=Path, nargs="*", default=[], help="folders of weights to start from")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    quiet()
    vae = AutoencoderKL.from_pretrained(options.out / "vae").eval()
    Trainer("mmdit", vae, options.out, options).run(loss)


if __name__ == "__main__":
    main()
