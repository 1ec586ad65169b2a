"""Denoiser geometries for speed: real block kinds, random weights (a static plan is as fast with any weights)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A denoiser, its inputs for one step, and the site that a forecast of nearly everything uses."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], dict[str, Any]]
    sample: str  # the input that moves
    site: str
    steps: int = 16
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    scale: float = 1.0  # of the timesteps
    branches: tuple[str, ...] | None = None  # where diffusers' TaylorSeer forecasts, if its default finds nothing

    def network(self) -> nn.Module:
        """The same denoiser every time."""
        torch.manual_seed(0)
        with torch.device(self.device):
            net = self.build()
        net = net if self.dtype == torch.float32 else net.to(self.dtype)
        return net.eval().requires_grad_(False)

    def arguments(self) -> dict[str, Any]:
        """The inputs of the first step."""
        drawn = self.inputs(torch.Generator().manual_seed(0))
        return {name: value.to(self.device, self.dtype) for name, value in drawn.items()} | {"return_dict": False}


def loop(case: Case) -> Callable[[nn.Module, Any], Tensor]:
    """One sampling run: the output is fed back into the sample with a small step."""
    first = case.arguments()  # once: the same prompt tensors in every run, as a server's prompt cache would have them

    @torch.no_grad()
    def run(net: nn.Module, prompt: Any) -> Tensor:
        inputs = dict(first)
        for step in range(case.steps):
            inputs["timestep"] = torch.full_like(inputs["timestep"], case.scale * (1.0 - step / case.steps))
            inputs[case.sample] = inputs[case.sample] - net(**inputs)[0] / case.steps
        return inputs[case.sample]

    return run


def mmdit() -> nn.Module:
    """3 double and 6 single blocks of width 512."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=512,
        pooled_projection_dim=256,
        axes_dims_rope=(8, 28, 28),
    )


def mmdit_inputs(draw: torch.Generator, side: int = 24, text: int = 64, wide: int = 512, pooled: int = 256) -> dict:
    """side x side image tokens and `text` text tokens."""
    grid = torch.stack(torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij"), -1)
    return {
        "hidden_states": torch.randn(1, side * side, 64, generator=draw),
        "encoder_hidden_states": torch.randn(1, text, wide, generator=draw),
        "pooled_projections": torch.randn(1, pooled, generator=draw),
        "timestep": torch.ones(1),
        "img_ids": torch.cat([torch.zeros(side * side, 1), grid.flatten(0, 1)], 1),
        "txt_ids": torch.zeros(text, 3),
    }


def flux() -> nn.Module:
    """19 double and 38 single blocks of width 3072, with guidance embedded."""
    return FluxTransformer2DModel(guidance_embeds=True)


def flux_inputs(draw: torch.Generator) -> dict[str, Any]:
    """1024 x 1024 pixels, 512 text tokens, and the guidance that the distilled model takes."""
    return mmdit_inputs(draw, 64, 512, 4096, 768) | {"guidance": torch.full((1,), 3.5)}


def unet() -> nn.Module:
    """A three-level U-Net with cross-attention, 96 to 384 channels."""
    return UNet2DConditionModel(
        sample_size=48,
        block_out_channels=(96, 192, 384),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=256,
        attention_head_dim=8,
    )


def unet_inputs(draw: torch.Generator) -> dict[str, Any]:
    """A batch of two (guidance merged) at 48 x 48."""
    return {
        "sample": torch.randn(2, 4, 48, 48, generator=draw),
        "timestep": torch.ones(()),
        "encoder_hidden_states": torch.randn(2, 16, 256, generator=draw),
    }


def sdxl() -> nn.Module:
    """The U-Net of SDXL."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
    )


def sdxl_inputs(draw: torch.Generator) -> dict[str, Any]:
    """A batch of two (guidance merged) at 1024 x 1024 pixels."""
    return {
        "sample": torch.randn(2, 4, 128, 128, generator=draw),
        "timestep": torch.ones(()),
        "encoder_hidden_states": torch.randn(2, 77, 2048, generator=draw),
    }


def video() -> nn.Module:
    """A DiT with cross-attention: 8 blocks of width 512."""
    return WanTransformer3DModel(
        num_attention_heads=8, attention_head_dim=64, text_dim=256, freq_dim=256, ffn_dim=2048, num_layers=8
    )


def video_inputs(draw: torch.Generator, size: tuple[int, ...] = (4, 24, 24), text: int = 64, wide: int = 256) -> dict:
    """Latent frames x height x width, patches of 1 x 2 x 2."""
    return {
        "hidden_states": torch.randn(1, 16, *size, generator=draw),
        "timestep": torch.ones(1),
        "encoder_hidden_states": torch.randn(1, text, wide, generator=draw),
    }


def wan() -> nn.Module:
    """The smaller Wan 2.1, 1.3 billion parameters."""
    return WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30)


def wan_inputs(draw: torch.Generator) -> dict[str, Any]:
    """81 frames of 480 x 832 pixels."""
    return video_inputs(draw, (21, 60, 104), 512, 4096)


OF_VIDEO = {"scale": 1000.0, "branches": (r"blocks\.\d+\.(attn1|attn2|ffn)",)}
CASES = (
    Case("mmdit", mmdit, mmdit_inputs, "hidden_states", "stack"),
    Case("dit with cross-attention", video, video_inputs, "hidden_states", "stack", **OF_VIDEO),
    Case("u-net", unet, unet_inputs, "sample", "cut:0", scale=1000.0),
)
GPU = {"device": "cuda", "dtype": torch.bfloat16}
GPU_CASES = (
    Case("FLUX.1 geometry, 1024 x 1024", flux, flux_inputs, "hidden_states", "stack", 28, **GPU),
    Case("SDXL U-Net, 1024 x 1024", sdxl, sdxl_inputs, "sample", "cut:0", 28, **GPU, scale=1000.0),
    Case("Wan 1.3B geometry, 480p", wan, wan_inputs, "hidden_states", "stack", 28, **GPU, **OF_VIDEO),
)
