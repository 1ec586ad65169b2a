"""What dcc compiles: a diffusers pipeline's denoiser, or a bare module with its own sampling loop.

The only file of the compiler that knows diffusers. It finds the denoiser by the attribute names that diffusers
pipelines share, runs the loop for recordings, and sets handlers on the denoiser (seam.py).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dcc import arguments
from dcc.errors import AlreadyCompiledError, PeerCacheError, PipelineError, PromptError
from dcc.record import seam
from dcc.record.pipeline_call import LATENT, check_call, parameters_of
from dcc.record.recorder import Recorder, StopAfterFirstCall
from dcc.torch_internals import COMPILED_CALL, hook_names, is_torch_compiled, progress_bar_settings

DENOISER_NAMES = ("transformer", "unet")
CACHE_HOOKS = ("cache", "fbc_", "pyramid_attention_broadcast")  # in the names of hooks that are diffusers' caches
PEER_MARKS = ("_is_cached", "is_cache_enabled", "enable_teacache")


@dataclass(frozen=True)
class Samples:
    """Final samples of n prompts, float32 on the CPU.

    `images` [n, ...] is what the caller gets, e.g. pixels in [0, 1]; `raw` the same before the final clamp (equal to
    `images` where the loop does not show it); `state` [n, ...] the sampler's last state, None where it is not shown.
    """

    images: Tensor
    raw: Tensor
    state: Tensor | None = None

    @staticmethod
    def concatenate(parts: Sequence[Samples]) -> Samples:
        """The samples of several batches as one."""
        states = [part.state for part in parts if part.state is not None]
        return Samples(
            torch.cat([part.images for part in parts]),
            torch.cat([part.raw for part in parts]),
            torch.cat(states) if len(states) == len(parts) else None,
        )


class PipelineTarget:
    """A DiffusionPipeline whose denoiser is compiled in place."""

    batches = True  # several prompts may share a run

    def __init__(self, pipe: Any, call_kwargs: dict[str, Any]) -> None:
        self.pipe, self.call_kwargs = pipe, call_kwargs
        self.name = _denoiser_name(pipe)

    @property
    def module(self) -> nn.Module:
        return getattr(self.pipe, self.name)

    @property
    def others(self) -> dict[str, nn.Module]:
        """The pipeline's other denoisers by name, as far as they are of the same class."""
        parts = vars(self.pipe).items()
        return {name: part for name, part in parts if type(part) is type(self.module) and part is not self.module}

    @property
    def scheduler(self) -> str:
        return type(self.pipe.scheduler).__name__

    @property
    def data_range(self) -> float | None:
        """The range of its decoded samples; None where its results are latents."""
        return None if self._latent else 1.0

    @property
    def _latent(self) -> bool:
        return self.call_kwargs.get("output_type") == LATENT

    def sample(self, prompts: Sequence[Any]) -> None:
        """One sampling run; several prompts make a batch. Decoding is left out where the pipeline can."""
        self._run(prompts, {"output_type": "latent", "generator": torch.Generator("cpu").manual_seed(0)})

    def generate(self, prompts: Sequence[Any], seeds: Sequence[int]) -> Samples:
        """The final samples of a batch of prompts; the noise of prompt i comes from seeds[i] alone.

        They are decoded, whatever form the caller's results have, unless those are latents.
        """
        seen: dict[str, Tensor] = {}
        callers: Any = self.call_kwargs.get("callback_on_step_end")

        def step_end(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            values = values if callers is None else callers(pipe, step, timestep, values)
            seen.update({name: value for name, value in values.items() if name == "latents"})
            return values

        own: dict[str, Any] = {
            "output_type": LATENT if self._latent else "pt",
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            "callback_on_step_end": step_end,
        }
        if hasattr(callers, "tensor_inputs"):  # diffusers' own callbacks say what they want to see
            own["callback_on_step_end_tensor_inputs"] = callers.tensor_inputs
        with contextlib.nullcontext() if self._latent else self._watch_decoded(seen):
            result = self._run(prompts, own)[0]
        batched = isinstance(result, Tensor) and len(result) == len(prompts)
        images = result.detach().float().cpu() if batched else _as_batch(result)
        raw = (seen["decoded"].detach().float().cpu() / 2 + 0.5) if "decoded" in seen else images
        raw = raw.reshape(images.shape) if raw.numel() == images.numel() else images
        state = seen["latents"].detach().float().cpu() if "latents" in seen else None
        return Samples(images, raw, state if state is not None and len(state) == len(images) else None)

    def _run(self, prompts: Sequence[Any], own: dict[str, Any]) -> Any:
        """Calls the pipeline on one prompt or a batch, without its progress bar; returns its outputs as a tuple.

        `own` are arguments that dcc gives, as far as the pipeline takes them. Raises PipelineError where the pipeline
        refuses the arguments of one prompt; of a batch it may well, and raises its own error.
        """
        accepted = parameters_of(self.pipe)
        own = {name: value for name, value in (own | {"return_dict": False}).items() if name in accepted}
        kwargs = self.call_kwargs | own
        prompt: Any = prompts[0]
        if len(prompts) > 1:
            prompt = list(prompts)
            texts = [name for name, value in kwargs.items() if "prompt" in name and isinstance(value, str)]
            kwargs |= {name: [kwargs[name]] * len(prompts) for name in texts}
        bar = progress_bar_settings(self.pipe)
        self.pipe.set_progress_bar_config(disable=True)
        try:
            return self.pipe(prompt, **kwargs)
        except (TypeError, ValueError) as error:
            if len(prompts) > 1:
                raise
            given = ", ".join(f"{name}={arguments.shown(value)}" for name, value in self.call_kwargs.items())
            raise PipelineError(
                f"{type(self.pipe).__name__} does not run on {arguments.shown(prompts[0])} with {given or 'defaults'}: "
                f"{error}"
            ) from error
        finally:
            self.pipe.set_progress_bar_config(**bar)

    @contextlib.contextmanager
    def _watch_decoded(self, seen: dict[str, Tensor]) -> Iterator[None]:
        """Keeps what the autoencoder decoded, in [-1, 1] but not clamped yet, as seen["decoded"]."""
        watched = []
        for owner, name in (("image_processor", "postprocess"), ("video_processor", "postprocess_video")):
            processor = getattr(self.pipe, owner, None)
            original = getattr(processor, name, None)
            if original is None:
                continue

            def watching(decoded: Tensor, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
                seen["decoded"] = decoded
                return _original(decoded, *args, **kwargs)

            setattr(processor, name, watching)
            watched.append((processor, name))
        try:
            yield
        finally:
            for processor, name in watched:
                delattr(processor, name)

    def fewer_steps(self, steps: int) -> PipelineTarget | None:
        """The same pipeline with another number of steps, None where its call takes no such number, or a list."""
        listed = any(self.call_kwargs.get(name) is not None for name in ("timesteps", "sigmas"))
        if listed or "num_inference_steps" not in parameters_of(self.pipe):
            return None
        return PipelineTarget(self.pipe, self.call_kwargs | {"num_inference_steps": steps})

    def install(self, handler: seam.Handler) -> Any:
        """Sets the handler on the denoiser; returns the pipeline."""
        seam.install(self.module, handler)
        return self.pipe


class ModuleTarget:
    """A bare denoiser and the function that runs one sampling loop with it."""

    others: ClassVar[dict[str, nn.Module]] = {}
    scheduler = "sample"
    data_range = None  # only the loop's author knows
    batches = False

    def __init__(self, module: nn.Module, sample: Callable[[nn.Module, Any], Any]) -> None:
        self._module, self._sample = module, sample

    @property
    def module(self) -> nn.Module:
        return self._module

    def sample(self, prompts: Sequence[Any]) -> None:
        """One run of the caller's loop, for the first prompt."""
        self._sample(self._module, prompts[0])

    def generate(self, prompts: Sequence[Any], seeds: Sequence[int]) -> Samples:
        """The final samples of the caller's loop, run once per prompt with torch's global generator at seeds[i].

        Raises PipelineError where the loop returns nothing.
        """
        results = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed)
                result = self._sample(self._module, prompt)
            if result is None:
                raise PipelineError("sample=fn must return the final sample (tensor, array or image); it returned None")
            results.append(_as_batch(result))
        images = torch.cat(results)
        return Samples(images, images)

    def fewer_steps(self, steps: int) -> None:
        """None, because a bare loop has its own number of steps."""
        return None

    def install(self, handler: seam.Handler) -> Any:
        """Sets the handler on the module; returns the module."""
        seam.install(self._module, handler)
        return self._module


Target = PipelineTarget | ModuleTarget


def _as_batch(result: Any) -> Tensor:
    """A final sample as float32 [n, ...] on the CPU; a single image, or a sample without batch, becomes n = 1."""
    if isinstance(result, (list, tuple)):
        return torch.cat([_as_batch(item) for item in result])
    if not isinstance(result, Tensor):
        array = np.asarray(result)  # PIL images too
        result = torch.from_numpy(array / 255.0 if array.dtype == np.uint8 else array)
    result = result.detach().float().cpu()
    return result if result.dim() >= 4 else result[None]


def is_pipeline(model: Any) -> bool:
    """Whether `model` is a DiffusionPipeline; whoever has one has imported diffusers, so dcc need not."""
    diffusers = sys.modules.get("diffusers")
    return diffusers is not None and isinstance(model, diffusers.DiffusionPipeline)


def make_target(model: Any, sample: Callable[..., Any] | None, call_kwargs: dict[str, Any]) -> Target:
    """The target for a pipeline or module.

    Raises PipelineError where it is neither, is not in a fit state, or does not take the arguments.
    """
    check_model(model, sample, call_kwargs)
    if is_pipeline(model):
        target: Target = PipelineTarget(model, call_kwargs)
    else:
        if sample is None and seam.handler_of(model) is None:
            raise PipelineError("a bare nn.Module needs sample=fn, where fn(net, prompt) runs one full sampling loop")
        target = ModuleTarget(model, sample or (lambda net, prompt: None))
    _check_state(target.module)
    return target


def check_model(model: Any, sample: Any, call_kwargs: dict[str, Any]) -> None:
    """Raises PipelineError unless `model` is a pipeline or module that takes these arguments, compiled or not."""
    arguments.function("sample", sample, "lambda net, prompt: loop(net, prompt)")
    if is_pipeline(model):
        if sample is not None:
            raise PipelineError("sample= is for a bare nn.Module; a pipeline brings its own sampling loop")
        check_call(model, call_kwargs)
    elif isinstance(model, seam.Handler):
        raise PipelineError(
            f"this {type(model).__name__} runs in the place of a denoiser; give the pipeline or the nn.Module that it "
            "was compiled for"
        )
    elif not isinstance(model, nn.Module):
        raise PipelineError(f"expected a diffusers pipeline or an nn.Module, got {type(model).__name__}")
    elif call_kwargs:
        raise PipelineError(f"a bare nn.Module takes no pipeline arguments: {', '.join(call_kwargs)}")


def load_pipeline(folder: str) -> Any:
    """A saved pipeline from its folder."""
    from diffusers.pipelines.pipeline_utils import (
        DiffusionPipeline,  # only where no caller brings a pipeline, and so diffusers, along
    )

    return DiffusionPipeline.from_pretrained(folder)


def call_parameters(model: Any) -> list[str]:
    """Names of the arguments that a pipeline's call takes, none for a module."""
    return list(parameters_of(model)) if is_pipeline(model) else []


def check_prompts(prompts: Any, text: bool, name: str = "prompts") -> list[Any]:
    """The prompts as a list. Raises PromptError unless they are a non-empty list (of strings if `text`)."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise PromptError(f"{name} must be a list, e.g. ['a red circle']; got {type(prompts).__name__}")
    if not prompts:
        raise PromptError(f"{name} is empty; give at least one prompt like those you will serve")
    for index, prompt in enumerate(prompts):
        if text and not isinstance(prompt, str):
            raise PromptError(f"{name}[{index}] is a {type(prompt).__name__}, not a string")
    return list(prompts)


@contextlib.contextmanager
def installed(target: Target, handler: seam.Handler | None) -> Iterator[None]:
    """Sets the handler, or none, on the denoiser inside the context, and always puts back what was there before."""
    with seam.installed(target.module, handler):
        yield


@contextlib.contextmanager
def recording(target: Target, recorder: Recorder | None = None, gradients: bool = False) -> Iterator[Recorder]:
    """Sets a Recorder on the denoiser inside the context, and always puts back what was there before.

    `gradients` are for loops that differentiate through the denoiser.
    """
    recorder = recorder or Recorder(target.module)
    try:
        with installed(target, recorder), torch.set_grad_enabled(gradients), torch.random.fork_rng():
            yield recorder
    except StopAfterFirstCall:
        pass


def denoiser_of(model: Any) -> Any:
    """The denoiser of a pipeline; anything else as it is."""
    return getattr(model, _denoiser_name(model)) if is_pipeline(model) else model


def restore_target(model: Any) -> Any:
    """Takes the handler off a pipeline's denoiser, or off a module; returns what it was given."""
    if seam.remove(denoiser_of(model)) is not None:
        return model
    if is_pipeline(model):
        raise PipelineError(f"pipe.{_denoiser_name(model)} is not compiled by dcc; there is nothing to restore")
    raise PipelineError(
        f"expected a compiled pipeline or module, got {type(model).__name__}, which dcc has not compiled"
    )


def _denoiser_name(pipe: Any) -> str:
    for name in DENOISER_NAMES:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise PipelineError(
        f"{type(pipe).__name__} has no denoiser under {' or '.join(DENOISER_NAMES)}; its components are: "
        f"{', '.join(pipe.components)}. Compile the module itself with dcc.compile(net, prompts, sample=fn)"
    )


def _check_state(module: nn.Module) -> None:
    """Refuses a denoiser that is compiled already, that another cache patches, or that is being trained."""
    name = type(module).__name__
    _check_uncompiled(module)
    marks = [mark for mark in PEER_MARKS if getattr(module, mark, None)]
    for path, part in module.named_modules():
        where = path or name
        hooks = hook_names(part)
        marks += [f"hook {hook!r} on {where}" for hook in hooks or [] if any(part in hook for part in CACHE_HOOKS)]
    if marks:
        found = ", ".join(marks[:3]) + (", ..." if marks[3:] else "")
        raise PeerCacheError(
            f"another cache is active on {name} ({found}); two caches would feed each other stale features. Take it "
            "off (diffusers: disable_cache(), cache-dit: disable_cache(pipe)) and compile again"
        )
    if module.training:
        raise PipelineError(f"{name} is in training mode; call .eval() on it first")


def _check_uncompiled(module: nn.Module) -> None:
    """Raises AlreadyCompiledError where dcc has compiled the module or a part of it, PipelineError for torch.compile.

    Before anything else is looked at: both replace `forward`, which looks like another library's patch.
    """
    name = type(module).__name__
    parts = dict(module.named_modules())
    ours = next((path for path, part in parts.items() if seam.handler_of(part) is not None), None)
    if ours is not None:
        what = f"{type(parts[ours]).__name__} (.{ours} of {name})" if ours else name
        raise AlreadyCompiledError(
            f"{what} is compiled by dcc already; dcc.restore it first, then compile with new settings"
        )
    for path, part in parts.items():
        where = f".{path} of {name}" if path else "it"
        if is_torch_compiled(part):
            raise PipelineError(
                f"{where if path else name} is wrapped by torch.compile; give dcc the module itself, it compiles it"
            )
        if vars(part).get(COMPILED_CALL) is not None:
            raise PipelineError(
                f"{name}: .compile() was called on {where}; give dcc the module as it was before, it compiles it"
            )
