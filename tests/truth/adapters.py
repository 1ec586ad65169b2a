"""Changes by adapters: LoRA and DoRA of every state that peft and diffusers know, and image-prompt adapters."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .loops import TEXT, Loop
from .table import Undo, change

LAYERS = {
    "dit": ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_mlp"),
    "unet": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
        "up_blocks.0.attentions.0.proj_in",
    ),
}


def weights(loop: Loop, seed: int, rank: int = 2, layers: int = 3) -> dict[str, Tensor]:
    """The state of a LoRA with random weights, as files hold it; of a convolution the factors are convolutions."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path in LAYERS[loop.model][:layers]:
        shape = loop.net.get_submodule(path).weight.shape
        state[f"{path}.lora_A.weight"] = torch.randn(rank, *shape[1:], generator=generator, dtype=torch.float32)
        shape_b = (shape[0], rank, *[1] * (len(shape) - 2))
        state[f"{path}.lora_B.weight"] = 0.1 * torch.randn(shape_b, generator=generator, dtype=torch.float32)
    return state


def load(loop: Loop, name: str, seed: int, **options: Any) -> None:
    """Loads such a LoRA and leaves its weights without gradients, as pipelines in use have them."""
    state = weights(loop, seed, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        loop.net.load_lora_adapter(state, prefix=None, adapter_name=name)
    loop.net.requires_grad_(False).eval()


def two_loras(loop: Loop) -> None:
    """Base: LoRAs a and b are loaded, a is active."""
    load(loop, "a", 1)
    load(loop, "b", 2)
    loop.net.set_adapters(["a"], [1.0])


def adapter(**options: Any) -> Any:
    return change("LoRA", peft=True, **options)


# ---------------------------------------------------------------- from a plain denoiser
@adapter()
def a_lora_loaded(loop: Loop) -> Undo | None:
    load(loop, "a", 1)
    return loop.net.unload_lora


@adapter()
def a_lora_added(loop: Loop) -> Undo | None:
    from peft import LoraConfig  # the table is read where peft is not installed, too

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=list(LAYERS[loop.model]), init_lora_weights=False)
        loop.net.add_adapter(config, "a")
    loop.net.requires_grad_(False).eval()
    return loop.net.unload_lora


@adapter()
def a_dora_added(loop: Loop) -> Undo | None:
    from peft import LoraConfig  # as above

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = [path for path in LAYERS[loop.model] if not path.endswith("proj_in")]
        loop.net.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False, use_dora=True), "a")
    loop.net.requires_grad_(False).eval()
    return loop.net.unload_lora


@adapter()
def a_lora_loaded_and_fused(loop: Loop) -> Undo | None:
    """As many pipelines are served: fused, and its layers taken off."""
    before = {path: loop.net.get_submodule(path).weight.detach().clone() for path in LAYERS[loop.model]}
    load(loop, "a", 1)
    loop.net.fuse_lora()
    loop.net.unload_lora()

    def undo() -> None:
        for path, weight in before.items():
            loop.net.get_submodule(path).weight.data = weight

    return undo


# ---------------------------------------------------------------- from one with two
@adapter(base=two_loras)
def its_scale(loop: Loop) -> Undo | None:
    loop.net.set_adapters(["a"], [0.3])
    return lambda: loop.net.set_adapters(["a"], [1.0])


@adapter(base=two_loras)
def the_other_lora(loop: Loop) -> Undo | None:
    loop.net.set_adapters(["b"])
    return lambda: loop.net.set_adapters(["a"], [1.0])


@adapter(base=two_loras)
def the_other_lora_without_weights(loop: Loop) -> Undo | None:
    loop.net.set_adapter("b")
    return lambda: loop.net.set_adapter("a")


@adapter(base=two_loras)
def both_loras_by_weights(loop: Loop) -> Undo | None:
    loop.net.set_adapters(["a", "b"], [0.7, 0.4])
    return lambda: loop.net.set_adapters(["a"], [1.0])


@adapter(base=two_loras)
def loras_disabled(loop: Loop) -> Undo | None:
    loop.net.disable_lora()
    return loop.net.enable_lora


@adapter(base=two_loras)
def adapters_disabled(loop: Loop) -> Undo | None:
    loop.net.disable_adapters()
    return loop.net.enable_adapters


@adapter(base=two_loras, exact=False, effect=None)
def a_lora_fused(loop: Loop) -> Undo | None:
    """The sum is another one in its last bits; so is what unfusing leaves."""
    loop.net.fuse_lora(adapter_names=["a"])
    return loop.net.unfuse_lora


@adapter(base=two_loras, exact=False)
def a_lora_fused_by_a_scale(loop: Loop) -> Undo | None:
    loop.net.fuse_lora(lora_scale=0.5, adapter_names=["a"])
    return loop.net.unfuse_lora


@adapter(base=two_loras, exact=False)
def the_other_lora_fused_beside(loop: Loop) -> Undo | None:
    loop.net.fuse_lora(adapter_names=["b"])

    def undo() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already unmerged")
            loop.net.unfuse_lora()

    return undo


@adapter(base=two_loras)
def loras_unloaded(loop: Loop) -> Undo | None:
    loop.net.unload_lora()
    return lambda: two_loras(loop)


@adapter(base=two_loras)
def the_active_lora_deleted(loop: Loop) -> Undo | None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter a was active")
        loop.net.delete_adapters("a")

    def undo() -> None:
        load(loop, "a", 1)
        loop.net.set_adapters(["a"], [1.0])

    return undo


@adapter(base=two_loras, effect=False)
def the_inactive_lora_deleted(loop: Loop) -> Undo | None:
    loop.net.delete_adapters("b")

    def undo() -> None:
        load(loop, "b", 2)
        loop.net.set_adapters(["a"], [1.0])

    return undo


@adapter(base=two_loras)
def a_lora_hot_swapped(loop: Loop) -> Undo | None:
    loop.net.load_lora_adapter(weights(loop, 5), prefix=None, adapter_name="a", hotswap=True)
    return lambda: loop.net.load_lora_adapter(weights(loop, 1), prefix=None, adapter_name="a", hotswap=True)


@adapter(base=two_loras)
def a_lora_of_another_rank_beside(loop: Loop) -> Undo | None:
    load(loop, "c", 6, rank=3, layers=2)
    loop.net.set_adapters(["a", "c"], [1.0, 0.5])

    def undo() -> None:
        loop.net.delete_adapters("c")
        loop.net.set_adapters(["a"], [1.0])

    return undo


@adapter(base=two_loras)
def the_scaling_of_one_layer(loop: Loop) -> Undo | None:
    """What peft keeps in a dict of every layer."""
    scaling = loop.net.get_submodule(LAYERS[loop.model][1]).scaling
    before, scaling["a"] = scaling["a"], 0.1
    return lambda: scaling.__setitem__("a", before)


@adapter(base=two_loras)
def a_scale_for_every_call(loop: Loop) -> Undo | None:
    name = "joint_attention_kwargs" if loop.model == "dit" else "cross_attention_kwargs"
    loop.arguments[name] = {"scale": 0.3}
    return lambda: loop.arguments.pop(name)


@adapter(base=two_loras)
def a_scale_set_in_mid_run(loop: Loop) -> Undo | None:
    """As a callback of the pipeline does."""

    def set_scale(by: float) -> Any:
        return lambda loop: loop.net.set_adapters(["a"], [by])

    loop.at_step.update({0: set_scale(1.0), 2: set_scale(0.3)})

    def undo() -> None:
        loop.at_step.clear()
        loop.net.set_adapters(["a"], [1.0])

    return undo


# ---------------------------------------------------------------- image prompts
TOKENS = 4


def image_adapter(loop: Loop, seed: int) -> dict[str, dict[str, Tensor]]:
    """The state of an image-prompt adapter with random weights, as files hold it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator, dtype=torch.float32)

    width = 32 if loop.model == "dit" else 16
    names = ["0"] if loop.model == "dit" else [str(1 + 2 * i) for i in range(3)]
    layers = {f"{name}.to_{which}_ip.weight": draw(width, TEXT) for name in names for which in "kv"}
    if loop.model == "dit":
        layers |= {f"{name}.to_{which}_ip.bias": draw(width) for name in names for which in "kv"}
    projection = {"proj.weight": draw(TOKENS * TEXT, 24), "proj.bias": draw(TOKENS * TEXT)}
    return {
        "ip_adapter": layers,
        "image_proj": projection | {"norm.weight": 1 + draw(TEXT), "norm.bias": draw(TEXT)},
    }


def with_image(loop: Loop) -> None:
    """Base: an image-prompt adapter is loaded and every call has an image."""
    loop.net._load_ip_adapter_weights([image_adapter(loop, 1)], low_cpu_mem_usage=False)
    loop.net.requires_grad_(False).eval()
    image = torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(9), dtype=torch.float32)
    if loop.model == "unet":
        loop.arguments["added_cond_kwargs"] = {"image_embeds": [image]}
    else:
        loop.arguments["joint_attention_kwargs"] = {"ip_adapter_image_embeds": [image]}


def _with_ip(loop: Loop) -> list[Any]:
    return [processor for processor in loop.net.attn_processors.values() if hasattr(processor, "to_k_ip")]


@change("image prompt")
def an_image_adapter_loaded(loop: Loop) -> Undo | None:
    before = loop.net.attn_processors
    with_image(loop)

    def undo() -> None:
        loop.arguments.clear()
        loop.net.set_attn_processor(dict(before))
        loop.net.encoder_hid_proj = None
        loop.net.config.encoder_hid_dim_type = None

    return undo


@change("image prompt", base=with_image)
def the_scale_of_an_image_adapter(loop: Loop) -> Undo | None:
    def set_scales(by: float) -> None:
        for processor in _with_ip(loop):
            processor.scale = [by]

    set_scales(0.4)
    return lambda: set_scales(1.0)


@change("image prompt", base=with_image)
def the_scale_of_an_image_adapter_written_in_its_list(loop: Loop) -> Undo | None:
    def set_scales(by: float) -> None:
        for processor in _with_ip(loop):
            processor.scale[0] = by

    set_scales(0.4)
    return lambda: set_scales(1.0)


@change("image prompt", base=with_image)
def another_image(loop: Loop) -> Undo | None:
    """An argument, not a state: it needs no new capture."""
    (name,) = loop.arguments
    images = next(iter(loop.arguments[name].values()))
    before, images[0] = images[0], -images[0]
    return lambda: images.__setitem__(0, before)


@change("image prompt", base=with_image)
def another_image_adapter(loop: Loop) -> Undo | None:
    loop.net._load_ip_adapter_weights([image_adapter(loop, 2)], low_cpu_mem_usage=False)
    loop.net.requires_grad_(False).eval()

    def undo() -> None:
        loop.net._load_ip_adapter_weights([image_adapter(loop, 1)], low_cpu_mem_usage=False)
        loop.net.requires_grad_(False).eval()

    return undo
