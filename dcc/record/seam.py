"""An nn.Module that stands in for a pipeline's denoiser: everything but `forward` is the original module's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Position:
    """What a pipeline says about a denoiser call through `cache_context`; the fields are those of diffusers."""

    name: str
    step_index: int | None = None
    num_inference_steps: int | None = None
    timestep: Any = None
    sigma: float | None = None


class DenoiserProxy(nn.Module):
    """Delegates attributes, weights, devices and dtypes to `original`, which is not registered as a submodule, so that
    `state_dict`, `parameters` and `to` are those of the original."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original
        self.__dict__["_position"] = ContextVar("position", default=None)
        self.train(original.training)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    @property
    def position(self) -> Position | None:
        """The innermost `cache_context` of this thread or task."""
        return self._position.get()

    @contextmanager
    def cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        """Names the stream ("cond", "uncond") of the calls inside, and where the loop stands; as in diffusers.

        `fields` may hold step_index, num_inference_steps, timestep and sigma; others are accepted and not used.
        """
        known = {key: fields[key] for key in Position.__dataclass_fields__ if key in fields}
        token = self._position.set(Position(name, **known))
        try:
            yield
        finally:
            self._position.reset(token)

    def train(self, mode: bool = True) -> DenoiserProxy:
        self.__dict__["original"].train(mode)
        self.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DenoiserProxy:
        self.original._apply(fn, recurse)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.original.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        return self.original.named_buffers(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return self.original.named_modules(*args, **kwargs)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        return self.original.named_children()

    def extra_repr(self) -> str:
        return f"original={type(self.original).__name__}"
