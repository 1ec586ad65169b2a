"""Changes of code: hooks, processors, replaced forwards and classes, replaced submodules, switches of the library."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.hooks.hooks import HookRegistry
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .loops import Loop
from .parts import attention, block, linear, put
from .table import Undo, change


# ---------------------------------------------------------------- hooks
def scaled(value: Any, by: float = 1.1) -> Any:
    """Every tensor of an output times a number."""
    return tuple(scaled(part, by) for part in value) if isinstance(value, tuple) else value * by


@change("hook")
def a_hook_that_changes_the_output(loop: Loop) -> Undo | None:
    return loop.net.register_forward_hook(lambda module, args, output: scaled(output)).remove


@change("hook")
def a_hook_that_changes_the_arguments(loop: Loop) -> Undo | None:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"encoder_hidden_states": 0.5 * kwargs["encoder_hidden_states"]}

    return loop.net.register_forward_pre_hook(hook, with_kwargs=True).remove


@change("hook")
def a_hook_that_changes_a_submodule_s_output(loop: Loop) -> Undo | None:
    return block(loop).ff.register_forward_hook(lambda module, args, output: scaled(output)).remove


@change("hook")
def a_hook_that_changes_a_submodule_s_arguments(loop: Loop) -> Undo | None:
    return linear(loop).register_forward_pre_hook(lambda module, args: (0.5 * args[0],)).remove


@change("hook", effect=None)
def a_hook_that_collects_features(loop: Loop) -> Undo | None:
    return block(loop).ff.register_forward_hook(lambda module, args, output: loop.seen.append(output.clone())).remove


@change("hook", effect=None)
def a_hook_that_collects_the_outputs(loop: Loop) -> Undo | None:
    return loop.net.register_forward_hook(lambda module, args, output: loop.seen.append(output[0].clone())).remove


@change("hook", effect=None)
def a_hook_that_counts(loop: Loop) -> Undo | None:
    return loop.net.register_forward_pre_hook(lambda module, args: loop.seen.append(torch.ones(1))).remove


@change("hook")
def a_hook_that_is_always_called(loop: Loop) -> Undo | None:
    hook = block(loop).register_forward_hook(lambda module, args, output: scaled(output), always_call=True)
    return hook.remove


@change("hook")
def a_hook_on_every_module(loop: Loop) -> Undo | None:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return scaled(output) if isinstance(module, nn.LayerNorm) else None

    return nn.modules.module.register_module_forward_hook(hook).remove


@change("hook")
def a_hook_whose_number_changes(loop: Loop) -> Undo | None:
    """The same hook object stays; what it reads is another number after the change."""
    state = types.SimpleNamespace(by=1.0)
    handle = block(loop).ff.register_forward_hook(lambda module, args, output: scaled(output, state.by))
    loop()
    state.by = 1.2
    return handle.remove


@change("hook", orders=("after",))  # before compiling, the recorded run raises it
def a_hook_that_raises(loop: Loop) -> Undo | None:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        raise ZeroDivisionError("the hook's own error")

    return block(loop).register_forward_hook(hook).remove


# ---------------------------------------------------------------- processors
class SoftJoint(FluxAttnProcessor):
    """The library's processor with a factor."""

    by = 0.7

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        found = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return scaled(found, self.by)


class SoftCross(AttnProcessor2_0):
    """The library's processor with a factor."""

    by = 0.7

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.by * super().__call__(attn, hidden_states, *args, **kwargs)


def soft(loop: Loop) -> Any:
    return SoftJoint() if loop.model == "dit" else SoftCross()


def softened(loop: Loop) -> None:
    """Base: one processor is our own."""
    attention(loop).set_processor(soft(loop))


@change("processor")
def all_processors_set(loop: Loop) -> Undo | None:
    before = loop.net.attn_processors
    loop.net.set_attn_processor(soft(loop))
    return lambda: loop.net.set_attn_processor(before)


@change("processor")
def one_processor_set(loop: Loop) -> Undo | None:
    before = attention(loop).processor
    softened(loop)
    return lambda: attention(loop).set_processor(before)


@change("processor", models=("unet",), effect=None)
def another_processor_of_the_library(loop: Loop) -> Undo | None:
    before = loop.net.attn_processors
    loop.net.set_attn_processor(AttnProcessor())
    return lambda: loop.net.set_attn_processor(before)


@change("processor", base=softened)
def a_number_of_a_processor(loop: Loop) -> Undo | None:
    return put(attention(loop).processor, "by", 0.4)


@change("processor")
def processors_set_while_the_loop_runs(loop: Loop) -> Undo | None:
    """As pipelines of perturbed attention do: set at the start of a run, put back at its end."""

    @contextmanager
    def perturbed(loop: Loop) -> Iterator[None]:
        before = attention(loop).processor
        attention(loop).set_processor(soft(loop))
        try:
            yield
        finally:
            attention(loop).set_processor(before)

    loop.within.append(perturbed)
    return loop.within.pop


@change("processor", models=("unet",), effect=None)
def attention_in_slices(loop: Loop) -> Undo | None:
    before = loop.net.attn_processors
    loop.net.set_attention_slice(1)
    return lambda: loop.net.set_attn_processor(before)


@change("projection", effect=None)
def projections_fused(loop: Loop) -> Undo | None:
    """What fusing adds stays on the attentions after it is undone."""
    loop.net.fuse_qkv_projections()
    return loop.net.unfuse_qkv_projections


@change("switch", models=("unet",))
def freeu(loop: Loop) -> Undo | None:
    loop.net.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    return loop.net.disable_freeu


@change("switch", models=("unet",), base=lambda loop: loop.net.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6))
def another_number_of_freeu(loop: Loop) -> Undo | None:
    loop.net.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.6)
    return lambda: loop.net.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)


@change("switch", models=("unet",), effect=None)
def forward_in_chunks(loop: Loop) -> Undo | None:
    loop.net.enable_forward_chunking(chunk_size=24, dim=1)
    return loop.net.disable_forward_chunking


@change("switch", models=("dit",))
def a_layer_skipped(loop: Loop) -> Undo | None:
    apply_layer_skip(loop.net, LayerSkipConfig(indices=[0], fqn="single_transformer_blocks", dropout=1.0))
    skipped = loop.net.single_transformer_blocks[0]
    return lambda: HookRegistry.check_if_exists_or_initialize(skipped).remove_hook("layer_skip_hook", recurse=True)


# ---------------------------------------------------------------- back-ends of attention
@change("attention back-end", models=("dit",), effect=None)
def an_attention_backend_set(loop: Loop) -> Undo | None:
    loop.net.set_attention_backend("_native_math")
    return loop.net.reset_attention_backend


@change("attention back-end", models=("dit",), effect=None)
def an_attention_backend_in_a_context(loop: Loop) -> Undo | None:
    loop.within.append(lambda loop: attention_backend("_native_math"))
    return loop.within.pop


@change("attention back-end", effect=None)
def a_kernel_of_attention_chosen(loop: Loop) -> Undo | None:
    loop.within.append(lambda loop: sdpa_kernel(SDPBackend.MATH))
    return loop.within.pop


@change("attention back-end")
def torch_s_own_function_replaced(loop: Loop) -> Undo | None:
    """As packages do that bring an attention of their own."""
    own = torch.nn.functional.scaled_dot_product_attention

    def ours(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        return 0.9 * own(query, key, value, **kwargs)

    return put(torch.nn.functional, "scaled_dot_product_attention", ours)


# ---------------------------------------------------------------- forwards and classes
@change("forward")
def a_submodule_s_forward_replaced(loop: Loop) -> Undo | None:
    own = block(loop).ff.forward
    return put(block(loop).ff, "forward", lambda *args, **kwargs: scaled(own(*args, **kwargs)))


@change("forward")
def a_submodule_s_forward_bound_anew(loop: Loop) -> Undo | None:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)

    return put(linear(loop), "forward", types.MethodType(forward, linear(loop)))


@change("forward")
def the_denoiser_s_forward_replaced(loop: Loop) -> Undo | None:
    own = loop.net.forward
    return put(loop.net, "forward", lambda *args, **kwargs: scaled(own(*args, **kwargs)))


def _class_patched(owner: type) -> Undo:
    own: Callable[..., Any] = owner.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return scaled(own(self, *args, **kwargs))

    owner.forward = forward
    return lambda: setattr(owner, "forward", own)


@change("forward")
def the_forward_of_a_submodule_s_class_replaced(loop: Loop) -> Undo | None:
    return _class_patched(FluxAttention if loop.model == "dit" else Attention)


@change("forward")
def the_forward_of_the_denoiser_s_class_replaced(loop: Loop) -> Undo | None:
    return _class_patched(type(loop.net))


class Halving:
    """Mixed into a block's class: of two neighbouring tokens the block sees the mean, as in token merging."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        merged = hidden_states.unflatten(1, (-1, 2)).mean(2, keepdim=True).expand(-1, -1, 2, -1).flatten(1, 2)
        return hidden_states + super().forward(merged, *args, **kwargs) - merged  # pyright: ignore


@change("class")
def the_class_of_a_submodule(loop: Loop) -> Undo | None:
    part = block(loop).ff
    before = type(part)
    part.__class__ = type("Merged", (Halving, before), {})
    return lambda: setattr(part, "__class__", before)


@change("class")
def the_class_of_a_block(loop: Loop) -> Undo | None:
    part = block(loop)
    before = type(part)

    class Louder(before):  # pyright: ignore
        @functools.wraps(before.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return scaled(super().forward(*args, **kwargs))

    part.__class__ = Louder
    return lambda: setattr(part, "__class__", before)


# ---------------------------------------------------------------- submodules
@change("submodule")
def a_submodule_replaced_by_another(loop: Loop) -> Undo | None:
    layer = linear(loop)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        other = nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)
    net = block(loop).ff.net
    net[2] = other
    return lambda: net.__setitem__(2, layer)


@change("submodule", effect=False)
def a_submodule_replaced_by_an_equal_one(loop: Loop) -> Undo | None:
    layer, net = linear(loop), block(loop).ff.net
    net[2] = copy.deepcopy(layer)
    return lambda: net.__setitem__(2, layer)


@change("submodule")
def a_submodule_replaced_by_the_identity(loop: Loop) -> Undo | None:
    return put(block(loop), "ff", nn.Identity())


@change("submodule")
def a_submodule_wrapped(loop: Loop) -> Undo | None:
    net, layer = block(loop).ff.net, linear(loop)
    net[2] = nn.Sequential(layer, nn.Tanh())
    return lambda: net.__setitem__(2, layer)


@change("submodule")
def a_layer_removed_from_a_list(loop: Loop) -> Undo | None:
    if loop.model == "dit":
        layers = loop.net.single_transformer_blocks
    else:
        layers = loop.net.down_blocks[0].attentions[0].transformer_blocks
    last = layers[-1]
    del layers[-1]
    return lambda: layers.append(last)


@change("submodule")
def a_layer_added_to_a_list(loop: Loop) -> Undo | None:
    if loop.model == "dit":
        layers = loop.net.single_transformer_blocks
    else:
        layers = loop.net.down_blocks[0].attentions[0].transformer_blocks
    layers.append(copy.deepcopy(layers[-1]))
    return lambda: layers.__delitem__(-1)


@change("submodule")
def an_activation_replaced(loop: Loop) -> Undo | None:
    if loop.model == "dit":
        return put(loop.net.single_transformer_blocks[0], "act_mlp", nn.ReLU())
    return put(loop.net.down_blocks[0].resnets[0], "nonlinearity", nn.ReLU())


@change("submodule", effect=False)
def a_submodule_that_is_not_used_added(loop: Loop) -> Undo | None:
    loop.net.add_module("unused", nn.Linear(2, 2))
    return lambda: loop.net._modules.pop("unused")
