"""In which state a denoiser is: told apart by a digest, and looked at again only where a `Mark` no longer holds."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dcc.capture.describe import described
from dcc.capture.settings import Floats
from dcc.capture.state import OUTSIDE, Mark, library, world
from dcc.record.seam import own_vars
from dcc.torch_internals import global_hooks, hook_names, version

HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True)
class State:
    """A state of a module. `hooks` says which hooks it has, None where none: no graph could stand for these.

    `held` are the objects that the digest tells apart by identity; held, so that no other gets that identity. `floats`
    are Python's floats by the attribute that they hang on, as text, and `bare` is a digest of all but these.
    """

    digest: str = ""
    hooks: str | None = field(default=None, compare=False)
    held: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    bare: str = field(default="", compare=False)
    floats: Floats = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, module: nn.Module, ignored: frozenset[str] = frozenset()) -> State:
        """The state that the module is in. `ignored` attributes make no difference."""
        held: list[Any] = []
        floats: dict[str, list[str]] = {}

        def name(value: Any) -> Any:
            held.append(value)
            return (id(value), version(value)) if isinstance(value, Tensor) else id(value)

        bare = _digest(module, name, ignored, floats)
        return cls(_hash((bare, floats)), hooks_of(module), tuple(held), bare, floats)

    def changed(self, other: State) -> frozenset[str] | None:
        """The attributes whose floats are others there, where all the rest is the same; None where it is not."""
        if self.bare != other.bare:
            return None
        names = (*self.floats, *other.floats)
        return frozenset(name for name in names if self.floats.get(name) != other.floats.get(name))


class Watch:
    """Follows the state of one module. `ignored` are attributes that the module's own calls change."""

    def __init__(self, module: nn.Module, ignored: frozenset[str], moved: Callable[[State], None]) -> None:
        self.module, self.ignored, self.moved = module, ignored, moved
        self._lock = threading.RLock()
        self._state: State | None = None
        self._mark: Mark | None = None

    @property
    def state(self) -> State:
        """The state that was found last."""
        return self._state or self.look()

    def look(self) -> State:
        """The state that the module is in now; tells `moved` where it may be another than at the last look."""
        with self._lock:
            if self._state is None or not self.holds():
                mark = Mark(self.module, self.ignored)  # first, so that what changes meanwhile is seen at the next look
                self._state = State.of(self.module, self.ignored)
                self.moved(self._state)
                self._mark = mark
            return self._state

    def holds(self) -> bool:
        """Whether the module is as it was at the last look."""
        mark = self._mark
        return mark is not None and mark.holds()

    def ignore(self, attributes: frozenset[str]) -> None:
        """Leaves these attributes out of the state from now on."""
        with self._lock:
            if not attributes <= self.ignored:
                self.ignored |= attributes
                self._state = self._mark = None


def lasting_digest(module: nn.Module) -> str:
    """A digest of a module's state that is the same in every process: what has no value counts by its name."""

    def name(value: Any) -> str:
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"{getattr(kind, '__module__', '')}.{kind.__qualname__}"

    return _digest(module, name, frozenset())


def _digest(
    module: nn.Module, name: Callable[[Any], Any], ignored: frozenset[str], floats: dict[str, list[str]] | None = None
) -> str:
    functions = tuple(name(function) for function in library() if callable(function))
    return _hash((described(module, name, ignored | OUTSIDE, floats), world(), functions))


def _hash(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def hooks_of(module: nn.Module) -> str | None:
    """Which hooks there are in a module, in words, None where there are none."""
    found = ["hooks on all modules"] if global_hooks() else []
    for path, part in module.named_modules():
        own = own_vars(part)
        names = [name[1:].replace("_", " ") for name in HOOKS if own.get(name)]
        names += [f"hook {name!r}" for name in hook_names(part) or []]
        names += ["an offloading hook"] if "_hf_hook" in own else []
        found += [f"{', '.join(names)} on {path or type(module).__name__}"] if names else []
    return f"{'; '.join(found[:3])}{'; ...' if found[3:] else ''}" if found else None
