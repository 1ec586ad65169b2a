"""One row of the table of changes: what may happen to a denoiser before or after it is compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Undo = Callable[[], object]
Make = Callable[[Any], Undo | None]  # takes a Loop, or a PipeLoop

TABLE: list[Change] = []


@dataclass(frozen=True)
class Change:
    """A change of a loop's denoiser or of what surrounds its calls; `make` returns what undoes it, or None.

    `make` is run on the compiled denoiser and on a copy that is never compiled, each in its turn, so it may also touch
    what the process has only one of. It draws random numbers only from generators of its own.
    """

    make: Make
    kind: str
    base: Make | None = None  # what is done to the plain denoiser first, before anything is compared
    models: tuple[str, ...] = ("dit", "unet")
    effect: bool | None = True  # whether the sample changes; None where that depends on the machine
    refused: tuple[str, ...] = ()  # orders ("before", "after") in which dcc may refuse it with a DccError of its own
    orders: tuple[str, ...] = ("before", "after")
    exact: bool = True  # it can be undone, to the last bit of the weights
    peft: bool = False  # needs peft
    pipeline: bool = False  # `make` takes the loop of a pipeline

    @property
    def name(self) -> str:
        """Its function's name in words."""
        return self.make.__name__.replace("_", " ")


def change(kind: str, **options: object) -> Callable[[Make], Make]:
    """Puts a function into the table."""

    def put(make: Make) -> Make:
        TABLE.append(Change(make, kind, **options))  # pyright: ignore[reportArgumentType]
        return make

    return put
