"""Changes by the methods of pipelines, and by what is given to their calls."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import StableDiffusionPAGPipeline
from torch import Tensor

from .adapters import image_adapter, weights
from .loops import TEXT, PipeLoop
from .table import Undo, change


def pipe(kind: str, **options: Any) -> Any:
    return change(kind, pipeline=True, **options)


def load(loop: PipeLoop, name: str = "a", seed: int = 1) -> None:
    """Loads a LoRA through the pipeline."""
    prefix = "transformer" if loop.model == "dit" else "unet"
    state = {f"{prefix}.{key}": value for key, value in weights(loop, seed).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        loop.pipe.load_lora_weights(state, adapter_name=name)
    loop.net.requires_grad_(False).eval()


@pipe("pipeline's LoRA", peft=True)
def load_lora_weights(loop: PipeLoop) -> Undo | None:
    load(loop)
    return loop.pipe.unload_lora_weights


@pipe("pipeline's LoRA", peft=True)
def set_adapters_with_weights(loop: PipeLoop) -> Undo | None:
    load(loop, "a", 1)
    load(loop, "b", 2)
    loop.pipe.set_adapters(["a", "b"], adapter_weights=[0.6, 0.3])
    return loop.pipe.unload_lora_weights


@pipe("pipeline's LoRA", peft=True)
def fuse_lora(loop: PipeLoop) -> Undo | None:
    """Unfusing leaves other last bits."""
    load(loop)
    loop.pipe.fuse_lora()

    def undo() -> None:
        loop.pipe.unfuse_lora()
        loop.pipe.unload_lora_weights()

    return undo


@pipe("pipeline's LoRA", peft=True)
def delete_one_of_two_adapters(loop: PipeLoop) -> Undo | None:
    load(loop, "a", 1)
    load(loop, "b", 2)
    loop.pipe.set_adapters(["a"])
    loop.pipe.delete_adapters("b")
    return loop.pipe.unload_lora_weights


@pipe("pipeline's LoRA", peft=True)
def a_scale_in_the_call(loop: PipeLoop) -> Undo | None:
    load(loop)
    name = "joint_attention_kwargs" if loop.model == "dit" else "cross_attention_kwargs"
    loop.arguments[name] = {"scale": 0.3}

    def undo() -> None:
        del loop.arguments[name]
        loop.pipe.unload_lora_weights()

    return undo


@pipe("pipeline's LoRA", peft=True)
def a_scale_set_by_a_callback(loop: PipeLoop) -> Undo | None:
    load(loop)
    loop.pipe.set_adapters(["a"], [1.0])

    def step_end(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe.set_adapters(["a"], [0.2 if step == 1 else 1.0])
        return values

    loop.arguments["callback_on_step_end"] = step_end

    def undo() -> None:
        del loop.arguments["callback_on_step_end"]
        loop.pipe.unload_lora_weights()

    return undo


@pipe("pipeline's prompt")
def textual_inversion(loop: PipeLoop) -> Undo | None:
    """It changes the text encoder and the tokenizer, and so what the denoiser is called with."""
    embedding = torch.randn(1, TEXT, generator=torch.Generator().manual_seed(4), dtype=torch.float32)
    loop.pipe.load_textual_inversion({"<shape>": embedding}, token="<shape>")
    loop.prompt = "a red <shape> above a blue square"

    def undo() -> None:
        loop.pipe.unload_textual_inversion()
        loop.prompt = PipeLoop.prompt

    return undo


@pipe("pipeline's image prompt", models=("unet",))
def load_ip_adapter(loop: PipeLoop) -> Undo | None:
    loop.pipe.load_ip_adapter(
        image_adapter(loop, 1), subfolder="", weight_name="", image_encoder_folder=None, low_cpu_mem_usage=False
    )
    loop.pipe.set_ip_adapter_scale(0.6)
    loop.net.requires_grad_(False).eval()
    image = torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(9), dtype=torch.float32)
    loop.arguments["ip_adapter_image_embeds"] = [torch.cat([torch.zeros_like(image), image])]

    def undo() -> None:
        del loop.arguments["ip_adapter_image_embeds"]
        loop.pipe.unload_ip_adapter()

    return undo


@pipe("pipeline's guidance", models=("unet",))
def perturbed_attention(loop: PipeLoop) -> Undo | None:
    """Another class of pipeline around the same parts, which sets processors while it runs."""
    before = loop.pipe
    loop.pipe = StableDiffusionPAGPipeline.from_pipe(before, pag_applied_layers=["down_blocks.0"])
    loop.pipe.set_progress_bar_config(disable=True)
    loop.arguments["pag_scale"] = 2.0

    def undo() -> None:
        del loop.arguments["pag_scale"]
        loop.pipe = before

    return undo


@pipe("pipeline's guidance", models=("unet",))
def freeu_of_the_pipeline(loop: PipeLoop) -> Undo | None:
    loop.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    return loop.pipe.disable_freeu


@pipe("pipeline's guidance", models=("unet",))
def another_guidance_scale(loop: PipeLoop) -> Undo | None:
    """Outside of the denoiser: it needs no new capture."""
    loop.arguments["guidance_scale"] = 2.0
    return lambda: loop.arguments.pop("guidance_scale")


@pipe("pipeline's guidance")
def latents_changed_by_a_callback(loop: PipeLoop) -> Undo | None:
    def step_end(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return values | {"latents": 0.9 * values["latents"]}

    loop.arguments["callback_on_step_end"] = step_end
    return lambda: loop.arguments.pop("callback_on_step_end")


@pipe("pipeline's guidance", effect=False)
def another_pipeline_around_the_same_parts(loop: PipeLoop) -> Undo | None:
    before = loop.pipe
    loop.pipe = type(before).from_pipe(before)
    loop.pipe.set_progress_bar_config(disable=True)

    def undo() -> None:
        loop.pipe = before

    return undo
