"""Denoiser geometries for speed: real block kinds, random weights (a static plan is as fast with any weights)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A denoiser, its inputs for one step, and the plan to time it with."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    sample: str  # the input that moves
    steps: int
    policy: dict[str, Any]


def loop(case: Case) -> Callable[[nn.Module, Any], Tensor]:
    """One sampling run: the output is fed back into the sample with a small step."""

    @torch.no_grad()
    def run(net: nn.Module, prompt: Any) -> Tensor:
        inputs = case.inputs()
        for step in range(case.steps):
            inputs["timestep"] = torch.full_like(inputs["timestep"], 1.0 - step / case.steps)
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
    ).eval()


def mmdit_inputs() -> dict[str, Any]:
    """1024 image and 64 text tokens."""
    draw = torch.Generator().manual_seed(0)
    grid = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"), -1).flatten(0, 1)
    return {
        "hidden_states": torch.randn(1, 1024, 64, generator=draw),
        "encoder_hidden_states": torch.randn(1, 64, 512, generator=draw),
        "pooled_projections": torch.randn(1, 256, generator=draw),
        "timestep": torch.ones(1),
        "img_ids": torch.cat([torch.zeros(1024, 1), grid], 1),
        "txt_ids": torch.zeros(64, 3),
        "return_dict": False,
    }


def unet() -> nn.Module:
    """A three-level U-Net with cross-attention, 128 to 512 channels."""
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(128, 256, 512),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=256,
        attention_head_dim=8,
    ).eval()


def unet_inputs() -> dict[str, Any]:
    """A batch of two (guidance merged) at 64 x 64."""
    draw = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, 64, 64, generator=draw),
        "timestep": torch.ones(2),
        "encoder_hidden_states": torch.randn(2, 16, 256, generator=draw),
        "return_dict": False,
    }


CASES = (
    Case("mmdit, residual of all blocks", mmdit, mmdit_inputs, "hidden_states", 16, {"interval": 4, "site": "stack"}),
    Case("mmdit, raw output", mmdit, mmdit_inputs, "hidden_states", 16, {"interval": 4, "site": "output"}),
    Case("u-net, outermost skip", unet, unet_inputs, "sample", 16, {"interval": 4, "site": "cut:0"}),
)
