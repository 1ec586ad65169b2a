"""Two very small denoisers, one like an MMDiT and one a U-Net, and the loops that sample with them.

A `Loop` is what a change changes: the denoiser itself, and what surrounds its calls (contexts, arguments, callbacks).
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import dcc

from ..denoisers import wake
from ..oracle import Made, Taken, Tap

LEVELS = (900.0, 700.0, 500.0, 300.0)
STEPS = len(LEVELS)
TEXT = 128  # channels of the prompt, as the text encoders of the demo pipelines make them

Denoise = Callable[[int, dict[str, Any]], Tensor]  # (step, arguments of the denoiser) -> its output


def dit() -> nn.Module:
    """One joint and one single block over 24 image and 7 text tokens; inputs as those of the demo pipeline."""
    torch.manual_seed(0)
    return wake(
        diffusers.FluxTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=16,
            joint_attention_dim=TEXT,
            pooled_projection_dim=TEXT,
            num_layers=1,
            num_single_layers=1,
            axes_dims_rope=(4, 4, 8),
        )
    )


def unet() -> nn.Module:
    """One level down, one up, with cross-attention in both; inputs as those of the demo pipeline."""
    torch.manual_seed(0)
    return wake(
        diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16,),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=TEXT,
            down_block_types=("CrossAttnDownBlock2D",),
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D",),
            attention_head_dim=8,
        )
    )


BUILD: dict[str, Callable[[], nn.Module]] = {"dit": dit, "unet": unet}
INNER = {"dit": "stack", "unet": "cut:0"}  # one site inside of each


def inner(net: nn.Module) -> tuple[Tap, ...]:
    """The inner site by module paths: the residual of all blocks, or what enters the last attention of the U-Net."""
    if isinstance(net, diffusers.UNet2DConditionModel):
        return (Tap(Made("up_blocks.0.attentions.0")),)
    single = len(net.single_transformer_blocks) - 1
    double = len(net.transformer_blocks) - 1
    last = f"single_transformer_blocks.{single}" if single >= 0 else f"transformer_blocks.{double}"
    first = "transformer_blocks.0" if double >= 0 else "single_transformer_blocks.0"
    return (Tap(Made(last, (1,)), Taken(first)),)


class Loop:
    """A sampling loop around a denoiser. Changes may set any of its attributes; `copy()` gives an independent one."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.dtype = torch.float32  # of the sample that the denoiser is called with
        self.batch = 1
        self.size = 24  # tokens of an image; a U-Net's image is 8 by a half of that
        self.levels = LEVELS
        self.arguments: dict[str, Any] = {}  # further arguments of every call
        self.within: list[Callable[[Loop], AbstractContextManager[Any]]] = []  # entered around every generation
        self.at_step: dict[int, Callable[[Loop], None]] = {}  # called before a step
        self.seen: list[Tensor] = []  # what hooks collect; compared like the sample
        self.gradients = ""  # "", or of what they are asked for: "sample", "weights"
        self.called: Callable[..., Any] | None = None  # what is called instead of the denoiser itself

    @property
    def model(self) -> str:
        """A name of `BUILD`."""
        return "unet" if isinstance(self.net, diffusers.UNet2DConditionModel) else "dit"

    def compile(self, **options: Any) -> None:
        """Compiles the denoiser in place, with this loop as what samples."""
        dcc.compile(self.net, [0], sample=lambda net, prompt: self()[0], backend="eager", **options)

    def copy(self) -> Loop:
        """A loop around a copy of the denoiser, with copies of its arguments."""
        loop = Loop(copy.deepcopy(self.net))
        loop.arguments = copy.deepcopy(self.arguments)
        return loop

    def __call__(self, seed: int = 1, denoise: Denoise | None = None) -> list[Tensor]:
        """The final sample of a generation, then whatever was collected and asked for on the way."""
        self.seen.clear()
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(bool(self.gradients)))
            for context in self.within:
                stack.enter_context(context(self))
            prompt, start = self._prompt(seed)
            start.requires_grad_(self.gradients == "sample")
            torch.manual_seed(seed)
            sample = start
            for step, level in enumerate(self.levels):
                if step in self.at_step:
                    self.at_step[step](self)
                output = (denoise or self._denoise)(step, self._call(prompt, sample, level))
                sample = sample - 0.2 * output.float()
            return [sample.detach(), *self.seen, *self._gradients(start, sample)]

    def _denoise(self, step: int, kwargs: dict[str, Any]) -> Tensor:
        return self.call(**kwargs)

    def call(self, **kwargs: Any) -> Tensor:
        """The denoiser's output for these arguments."""
        return (self.net if self.called is None else self.called)(**kwargs)[0]

    def _prompt(self, seed: int) -> tuple[dict[str, Any], Tensor]:
        """New prompt tensors, to be passed at every step as pipelines do, and the noise to start from."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(self.batch, *shape, generator=generator, dtype=torch.float32)

        text = draw(7, TEXT).to(self.dtype)
        if self.model == "unet":
            return {"encoder_hidden_states": text}, draw(4, 8, self.size // 2)
        ids = torch.zeros(self.size, 3)
        ids[:, 1], ids[:, 2] = torch.arange(self.size) // 6, torch.arange(self.size) % 6
        prompt = {"encoder_hidden_states": text, "pooled_projections": draw(TEXT).to(self.dtype)}
        return prompt | {"img_ids": ids.to(self.dtype), "txt_ids": torch.zeros(7, 3).to(self.dtype)}, draw(
            self.size, 16
        )

    def _call(self, prompt: dict[str, Any], sample: Tensor, level: float) -> dict[str, Any]:
        called = prompt | self.arguments | {"return_dict": False}
        sample = sample.to(self.dtype)
        if self.model == "unet":
            return called | {"sample": sample, "timestep": torch.tensor(int(level))}
        return called | {"hidden_states": sample, "timestep": torch.full((self.batch,), level / 1000).to(self.dtype)}

    def _gradients(self, start: Tensor, sample: Tensor) -> list[Tensor]:
        """The gradients that were asked for; none where the sample has none, which the comparison then shows."""
        if not self.gradients or not sample.requires_grad:
            return []
        asked = [start] if self.gradients == "sample" else [p for p in self.net.parameters() if p.requires_grad]
        found = torch.autograd.grad(sample.square().sum(), asked, allow_unused=True)
        return [torch.zeros(()) if gradient is None else gradient for gradient in found]


class PipeLoop(Loop):
    """The loop of a demo pipeline that has one of the very small denoisers."""

    prompt = "a red circle above a blue square"

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe.transformer if hasattr(pipe, "transformer") else pipe.unet)
        self.pipe = pipe
        self.arguments = {"num_inference_steps": STEPS, "height": 64, "width": 64, "output_type": "latent"}
        if self.model == "dit":
            self.arguments["max_sequence_length"] = 16

    def compile(self, **options: Any) -> None:
        known = {name: value for name, value in self.arguments.items() if name != "output_type"}
        dcc.compile(self.pipe, [self.prompt], backend="eager", **options, **known)

    def __call__(self, seed: int = 1, denoise: Denoise | None = None) -> list[Tensor]:
        self.seen.clear()
        with ExitStack() as stack:
            for context in self.within:
                stack.enter_context(context(self))
            if denoise is not None:
                stack.enter_context(_answered(self.net, denoise))
            generator = torch.Generator().manual_seed(seed)
            return [self.pipe(self.prompt, generator=generator, **self.arguments).images, *self.seen]


@contextmanager
def _answered(net: nn.Module, denoise: Denoise) -> Iterator[None]:
    """What calls the denoiser gets the answers of `denoise`, which may call it itself; one call is one step."""
    own, steps, inside = net.forward, itertools.count(), []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if inside:
            return own(*args, **kwargs)
        inside.append(True)
        try:
            return (denoise(next(steps), inspect.signature(own).bind(*args, **kwargs).arguments),)
        finally:
            inside.clear()

    net.forward = forward
    try:
        yield
    finally:
        del net.forward


def pipeline(model: str) -> PipeLoop:
    """A new demo pipeline with a very small denoiser."""
    pipe = dcc.demo.load("mmdit" if model == "dit" else "unet")
    setattr(pipe, "transformer" if model == "dit" else "unet", BUILD[model]())
    return PipeLoop(pipe)
