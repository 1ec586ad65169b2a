"""Changes of the mode in which a denoiser runs: contexts, training, gradients, offloading, caches and compilers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    TaylorSeerCacheConfig,
    apply_group_offloading,
    apply_layerwise_casting,
)
from torch import Tensor, nn

from .loops import Loop
from .parts import block, linear, noise, put
from .patches import scaled
from .table import Undo, change


# ---------------------------------------------------------------- contexts and settings of the process
@change("context")
def autocast(loop: Loop) -> Undo | None:
    """Some of the library's own products are of types that autocast on the CPU does not take; torch warns of them."""

    @contextmanager
    def quietly(loop: Loop) -> Iterator[None]:
        with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
            warnings.simplefilter("ignore")
            yield

    loop.within.append(quietly)
    return loop.within.pop


@change("context", effect=False)
def inference_mode(loop: Loop) -> Undo | None:
    loop.within.append(lambda loop: torch.inference_mode())
    return loop.within.pop


@change("context", effect=None)
def another_default_type(loop: Loop) -> Undo | None:
    torch.set_default_dtype(torch.float64)
    return lambda: torch.set_default_dtype(torch.float32)


@change("context", effect=None)
def deterministic_algorithms(loop: Loop) -> Undo | None:
    torch.use_deterministic_algorithms(True)
    return lambda: torch.use_deterministic_algorithms(False)


@change("context", effect=None)
def another_precision_of_matrix_products(loop: Loop) -> Undo | None:
    torch.set_float32_matmul_precision("medium")
    return lambda: torch.set_float32_matmul_precision("highest")


# ---------------------------------------------------------------- training flags and gradients
@change("training", effect=False)
def training_mode(loop: Loop) -> Undo | None:
    loop.net.train()
    return loop.net.eval


def with_dropout(loop: Loop) -> None:
    """Base: the first block's MLP ends with a dropout that is switched off."""
    net = block(loop).ff.net
    net[1] = nn.Dropout(0.3).eval()


@change("training", base=with_dropout)
def training_mode_with_dropout(loop: Loop) -> Undo | None:
    loop.net.train()
    return loop.net.eval


@change("training", base=with_dropout)
def training_mode_of_a_dropout(loop: Loop) -> Undo | None:
    dropout = block(loop).ff.net[1]
    dropout.train()
    return dropout.eval


class Normed(nn.Module):
    """A layer behind a batch norm."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(layer.in_features), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x.transpose(1, 2)).transpose(1, 2))


def with_batch_norm(loop: Loop) -> None:
    """Base: a batch norm with some statistics."""
    block(loop).ff.net[2] = Normed(linear(loop)).eval()


@change("training", base=with_batch_norm)
def training_mode_of_a_batch_norm(loop: Loop) -> Undo | None:
    """Its statistics advance at every call, and at no other time."""
    norm = block(loop).ff.net[2].norm
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.train()

    def undo() -> None:
        norm.eval()
        norm.load_state_dict(before)

    return undo


@change("gradients", effect=False)
def gradient_checkpointing(loop: Loop) -> Undo | None:
    loop.net.enable_gradient_checkpointing()
    return loop.net.disable_gradient_checkpointing


@change("gradients", effect=None)
def gradients_of_the_sample(loop: Loop) -> Undo | None:
    return put(loop, "gradients", "sample")


@change("gradients", effect=None)
def gradients_of_some_weights(loop: Loop) -> Undo | None:
    linear(loop).requires_grad_(True)
    loop.gradients = "weights"

    def undo() -> None:
        linear(loop).requires_grad_(False)
        loop.gradients = ""

    return undo


@change("gradients", effect=None)
def gradients_with_checkpointing(loop: Loop) -> Undo | None:
    loop.net.train()
    loop.net.enable_gradient_checkpointing()
    loop.gradients = "sample"

    def undo() -> None:
        loop.net.eval()
        loop.net.disable_gradient_checkpointing()
        loop.gradients = ""

    return undo


# ---------------------------------------------------------------- casting and offloading by hooks
@change("hooks of the library", effect=None, exact=False)
def layerwise_casting(loop: Loop) -> Undo | None:
    """The library has no way back."""
    apply_layerwise_casting(loop.net, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


@change("hooks of the library", effect=False, exact=False)
def group_offload_of_leaves(loop: Loop) -> Undo | None:
    """From the CPU to the CPU, as a machine without an accelerator can; the library's hooks are the same."""
    apply_group_offloading(loop.net, onload_device=torch.device("cpu"), offload_type="leaf_level")


@change("hooks of the library", effect=False, exact=False)
def group_offload_of_blocks(loop: Loop) -> Undo | None:
    apply_group_offloading(
        loop.net, onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


# ---------------------------------------------------------------- caches, compilers, quantised weights
def _cached(loop: Loop, config: Any) -> Undo:
    loop.net.enable_cache(config)

    @contextmanager
    def one_run(loop: Loop) -> Iterator[None]:
        HookRegistry.check_if_exists_or_initialize(loop.net).reset_stateful_hooks(recurse=True)
        with loop.net.cache_context("cond"):
            yield

    loop.within.append(one_run)

    def undo() -> None:
        loop.within.pop()
        loop.net.disable_cache()

    return undo


@change("another cache", models=("dit",), refused=("before",))
def first_block_cache(loop: Loop) -> Undo | None:
    return _cached(loop, FirstBlockCacheConfig(threshold=10.0))


@change("another cache", models=("dit",), refused=("before",))
def mag_cache(loop: Loop) -> Undo | None:
    ratios = [1.0, 0.9, 0.9, 0.9]
    return _cached(loop, MagCacheConfig(threshold=9.0, num_inference_steps=4, mag_ratios=ratios, retention_ratio=0.0))


@change("another cache", models=("dit",), refused=("before",))
def taylorseer_cache(loop: Loop) -> Undo | None:
    return _cached(loop, TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1))


@change("compiler", effect=False, refused=("before",))
def torch_compile_on_top(loop: Loop) -> Undo | None:
    torch.compiler.reset()
    return put(loop, "called", torch.compile(loop.net, backend="eager"))


@change("compiler", effect=False, refused=("before", "after"))
def module_compile(loop: Loop) -> Undo | None:
    """After dcc it is refused, before dcc too; where nothing is refused the module's own compiler runs."""
    torch.compiler.reset()
    loop.net.compile(backend="eager")
    return lambda: setattr(loop.net, "_compiled_call_impl", None)


# ---------------------------------------------------------------- what callbacks do in the middle of a run
def _in_mid_run(loop: Loop, first: Callable[[Loop], object], then: Callable[[Loop], object]) -> Undo:
    """`first` before step 0 of every generation, `then` before step 2."""
    loop.at_step.update({0: first, 2: then})

    def undo() -> None:
        loop.at_step.clear()
        first(loop)

    return undo


@change("in mid run")
def an_attribute_set_in_mid_run(loop: Loop) -> Undo | None:
    norm = block(loop).norm1.norm if loop.model == "dit" else block(loop).norm1
    before = norm.eps
    return _in_mid_run(loop, lambda loop: setattr(norm, "eps", before), lambda loop: setattr(norm, "eps", 0.5))


@change("in mid run")
def a_weight_written_in_mid_run(loop: Loop) -> Undo | None:
    bias = linear(loop).bias
    before = bias.clone()
    return _in_mid_run(loop, lambda loop: bias.copy_(before), lambda loop: bias.add_(noise(bias)))


@change("in mid run")
def a_hook_added_in_mid_run(loop: Loop) -> Undo | None:
    handles: list[Any] = []

    def take_off(loop: Loop) -> None:
        while handles:
            handles.pop().remove()

    def add(loop: Loop) -> None:
        handles.append(block(loop).ff.register_forward_hook(lambda module, args, output: scaled(output)))

    return _in_mid_run(loop, take_off, add)


@change("in mid run")
def a_submodule_replaced_in_mid_run(loop: Loop) -> Undo | None:
    part = block(loop)
    mlp = part.ff
    return _in_mid_run(loop, lambda loop: setattr(part, "ff", mlp), lambda loop: setattr(part, "ff", nn.Identity()))
