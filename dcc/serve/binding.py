"""Gives every input of a variant its tensor: one binding for static, triggered and instrumented runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dcc.capture.captured import Captured
from dcc.passes.values import Anchor, Factor, Handed, Input, Once, Seen, State
from dcc.record.call import Call
from dcc.variants.correctors import Factors

MOST = 4096  # small tensors kept; past that they are made anew


EMPTY: Mapping[Any, Any] = MappingProxyType({})


def _none(*_: Any) -> Any:
    """Stands for inputs that a run does not have, and that no graph of it asks for."""
    raise LookupError("this run has none of these inputs")


class Tables:
    """Small tensors on the device, made once for equal numbers, and the matrices of correctors' maps."""

    def __init__(self) -> None:
        self.made: dict[Any, Tensor] = {}
        self.factors = Factors()

    def numbers(self, key: Any, values: tuple[int, ...], device: torch.device) -> Tensor:
        """Whole numbers [n] int64 on the device."""
        return self._known((key, values, device), lambda: torch.tensor(values, dtype=torch.int64).to(device))

    def coefficients(
        self, key: Any, rows: Callable[[], Sequence[Sequence[float]]], batch: int, anchors: int, device: torch.device
    ) -> Tensor:
        """Coefficients [rows, batch, anchors] float32, the same for every sample; `key` is equal for equal rows."""

        def make() -> Tensor:
            padded = [[*values, *([0.0] * (anchors - len(values)))] for values in rows()]
            table = torch.tensor(padded, dtype=torch.float64).to(torch.float32)
            return table[:, None].expand(-1, batch, -1).contiguous().to(device)

        return self._known(("coefficients", key, batch, device), make)

    def _known(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        if key not in self.made:
            if len(self.made) >= MOST:
                self.made.clear()
            self.made[key] = make()
        return self.made[key]


class Binding:
    """The tensors of one call of one stream. Implements dcc.passes.values.Served.

    `history` holds, by site, objects whose `values` are the kept values newest first; where fewer are there than a
    graph takes, the oldest stands in, with coefficient 0. `chosen` are the samples that a region runs for, None for
    all. `halved` is the size of the whole batch where only its conditional half runs.
    """

    def __init__(
        self,
        tables: Tables,
        captured: Captured,
        call: Call,
        step: float,
        history: Mapping[str, Any] = EMPTY,
        *,
        coefficients: Callable[[], Tensor] = _none,
        states: Mapping[State, Tensor] = EMPTY,
        once: Callable[[Binding], Mapping[str, Tensor]] = _none,
        watch: Any = None,
        handed: Mapping[str, Tensor] = EMPTY,
        chosen: Tensor | None = None,
        halved: int | None = None,
    ) -> None:
        self.tables, self.captured, self.step, self.history = tables, captured, step, history
        self.arguments = dict(zip(call.names, call.tensors, strict=True))
        self.device = call.tensors[0].device
        self.like = call.tensors[0]
        self._coefficients, self.states, self._once = coefficients, states, once
        self.watch, self._handed, self.chosen, self.halved = watch, handed, chosen, halved
        self._held: Mapping[str, Tensor] | None = None

    def of(self, inputs: Sequence[Input]) -> list[Tensor]:
        """The tensors of these inputs, in order."""
        return [value.tensor(self) for value in inputs]

    def argument(self, path: str) -> Tensor:
        """A tensor that the caller gave."""
        return self.arguments[path]

    def coefficients(self) -> Tensor:
        """The table of coefficients that weighs anchors."""
        return self._coefficients()

    def anchor(self, anchor: Anchor) -> Tensor:
        """A kept value of a site's port, for the samples that run."""
        kept = self.history[anchor.site].values
        value = kept[anchor.age if anchor.age < len(kept) else -1][anchor.port]
        if anchor.batched:
            if self.chosen is not None:
                return value[self.chosen]
            if self.halved is not None and len(value) == self.halved:
                return value[self.halved // 2 :]
        return value

    def state(self, state: State) -> Tensor:
        """State of token selection that the last call left."""
        return self.states[state]

    def once(self, once: Once) -> Tensor:
        """A value that no step changes; all of them are computed when the first is asked for."""
        if self._held is None:
            self._held = self._once(self)
        return self._held[once.node]

    def factor(self, factor: Factor) -> Tensor:
        """A matrix of a corrector's map, for the weight as it is now."""
        name, captured = factor.correction.weight, self.captured
        if not name:
            weight = self.like
        elif name in captured.weights:
            weight = captured.weights[name].get()
        else:
            weight = captured.constants[name]
        return self.tables.factors.of(factor.correction, weight, bool(name))[factor.index]

    def seen(self, seen: Seen) -> Tensor:
        """A watched value of the step before, or of an earlier computed step, for the samples that run."""
        watch = self.watch
        value = watch.previous[seen.port] if seen.which == "previous" else watch.seen[seen.port].at(seen.which)[0]
        return value if self.chosen is None else value[self.chosen]

    def handed(self, handed: Handed) -> Tensor:
        """A tensor that the prefix hands over, for the samples that run."""
        value = self._handed[handed.node]
        return value if self.chosen is None or not handed.batched else value[self.chosen]

    def number(self, key: Any, values: tuple[int, ...]) -> Tensor:
        """Whole numbers [n] int64 on the device, made once for equal `key` and `values`."""
        return self.tables.numbers(key, values, self.device)
