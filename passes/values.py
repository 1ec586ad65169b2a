"""What a graph takes and returns besides the denoiser's own tensors: a small value for each input and output.

The pass that adds an input or output declares it by `declare` or `emit`; the node keeps the value in its meta, and a
Variant reads it from there. An input itself says which tensor it is in the call being served (`tensor`), so a pass
with a new kind of input is one file. Names are for people who read graphs: nothing parses or rebuilds one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dcc.passes.base import Correction, Look, Port, identifier
from dcc.passes.graph import add_placeholder, output_node, returned

VALUE = "dcc_value"  # meta of a placeholder: the Input that it is; of a node that is returned: the Output


class Served(Protocol):
    """The call that is being served, as inputs see it. Implemented by dcc.serve.binding.Binding."""

    step: float  # the sampler's step; fractional between the plan's noise levels
    device: torch.device

    def argument(self, path: str) -> Tensor:
        """A tensor that the caller gave."""
        ...

    def coefficients(self) -> Tensor:
        """Coefficients [rows, batch, J] float32, one row per forecast."""
        ...

    def anchor(self, anchor: Anchor) -> Tensor:
        """A kept value of a site's port."""
        ...

    def state(self, state: State) -> Tensor:
        """State of token selection that the last call left."""
        ...

    def once(self, once: Once) -> Tensor:
        """A value that no step changes."""
        ...

    def factor(self, factor: Factor) -> Tensor:
        """A matrix of a corrector's map."""
        ...

    def seen(self, seen: Seen) -> Tensor:
        """A watched value, as it was at an earlier step."""
        ...

    def handed(self, handed: Handed) -> Tensor:
        """A tensor that the prefix computed."""
        ...

    def number(self, key: Any, values: tuple[int, ...]) -> Tensor:
        """Whole numbers [n] int64 on the device, made once for equal `key` and `values`."""
        ...


@dataclass(frozen=True)
class Input:
    """A graph input. Compares by value; two passes that declare equal inputs share one."""

    @property
    def name(self) -> str:
        """The placeholder's name."""
        raise NotImplementedError

    def tensor(self, served: Served) -> Tensor:
        """The tensor to pass for this input in the call being served."""
        raise NotImplementedError


class Number(Input):
    """A tensor [] that stands for a number of the module itself: it scales values as one in the code would."""


@dataclass(frozen=True)
class Argument(Input):
    """A tensor of the call, by its path (dcc.record.call.Call); `placeholder` is its name in the captured graph."""

    path: str
    placeholder: str

    @property
    def name(self) -> str:
        return self.placeholder

    def tensor(self, served: Served) -> Tensor:
        return served.argument(self.path)


@dataclass(frozen=True)
class Coefficients(Input):
    """The table [rows, batch, J] float32 that weighs anchors, newest first."""

    name: ClassVar[str] = "coefficients"  # type: ignore[misc]

    def tensor(self, served: Served) -> Tensor:
        return served.coefficients()


@dataclass(frozen=True)
class Anchor(Input):
    """The value of a site's port `age` anchors ago; 0 is the newest.

    `batched` says that its first dimension counts the samples of the batch; a row that runs on the conditional half of
    a guidance batch then takes the second half of it.
    """

    site: str
    port: int
    age: int
    batched: bool = False

    @property
    def name(self) -> str:
        return f"anchor_{identifier(self.site)}_{self.port}_{self.age}"

    def tensor(self, served: Served) -> Tensor:
        return served.anchor(self)


@dataclass(frozen=True)
class Channels(Input):
    """The cluster of each channel [C] int64, for a site forecast by clusters of channels."""

    site: str
    of_channel: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"channels_{identifier(self.site)}"

    def tensor(self, served: Served) -> Tensor:
        return served.number(self.site, self.of_channel)


@dataclass(frozen=True)
class Factor(Input):
    """The matrix or bias number `index` of a corrector's map."""

    correction: Correction
    index: int

    @property
    def name(self) -> str:
        return f"factor_{identifier(self.correction.site)}_{self.correction.port}_{self.index}"

    def tensor(self, served: Served) -> Tensor:
        return served.factor(self)


@dataclass(frozen=True)
class Once(Input):
    """The value of a node of the captured graph that no step changes."""

    node: str

    @property
    def name(self) -> str:
        return f"once_{self.node}"

    def tensor(self, served: Served) -> Tensor:
        return served.once(self)


@dataclass(frozen=True)
class State(Input):
    """State of token selection, of one site or, without a `site`, of the whole stream."""

    kind: str
    site: str = ""

    @property
    def name(self) -> str:
        return f"state_{self.kind}_{identifier(self.site)}".rstrip("_").lower()

    def tensor(self, served: Served) -> Tensor:
        return served.state(self)


@dataclass(frozen=True)
class Step(Input):
    """The number of the sampler's step, [1] int64."""

    name: ClassVar[str] = "step"  # type: ignore[misc]

    def tensor(self, served: Served) -> Tensor:
        return served.number("step", (round(served.step),))


@dataclass(frozen=True)
class Seen(Input):
    """A watched value of the step before ("previous"), or of `which` computed steps ago."""

    port: Port
    which: str | int

    @property
    def name(self) -> str:
        return f"seen_{_label(self.port)}_{self.which}"

    def tensor(self, served: Served) -> Tensor:
        return served.seen(self)


@dataclass(frozen=True)
class Handed(Input):
    """A node's value that the prefix of a triggered step hands to the suffix; `batched` as in Anchor."""

    node: str
    batched: bool = False

    @property
    def name(self) -> str:
        return self.node

    def tensor(self, served: Served) -> Tensor:
        return served.handed(self)


@dataclass(frozen=True)
class Output:
    """Something that a graph returns besides the denoiser's own outputs."""

    @property
    def name(self) -> str:
        """The node's name."""
        raise NotImplementedError


@dataclass(frozen=True)
class Write(Output):
    """The fresh value of a site's port, to be kept as an anchor."""

    site: str
    port: int

    @property
    def name(self) -> str:
        return f"write_{identifier(self.site)}_{self.port}"


@dataclass(frozen=True)
class Next(Output):
    """The next value of a state."""

    state: State

    @property
    def name(self) -> str:
        return f"next_{self.state.name}"


@dataclass(frozen=True)
class Watched(Output):
    """A value that a trigger compares with later ones."""

    port: Port

    @property
    def name(self) -> str:
        return f"watch_{_label(self.port)}"


@dataclass(frozen=True)
class Distance(Output):
    """The distances [batch] float32 that a trigger reads."""

    look: Look

    @property
    def name(self) -> str:
        return f"look_{_label(self.look.port)}_{self.look.against}_{self.look.norm}"


def declare(graph_module: GraphModule, value: Input, like: Tensor) -> Node:
    """The graph input for a value: the one that is there, or a new one after the existing ones with `like` as meta."""
    known = input_node(graph_module, value)
    if known is not None:
        return known
    node = add_placeholder(graph_module, value.name, like)
    node.meta[VALUE] = value
    return node


def is_number(node: Node) -> bool:
    """Whether a node stands for a number of the module itself."""
    return isinstance(node.meta.get(VALUE), Number)


def input_node(graph_module: GraphModule, value: Input) -> Node | None:
    """The placeholder that was declared as this value, None where there is none."""
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            return None
        if node.meta.get(VALUE) == value:
            return node
    return None


def emit(graph_module: GraphModule, value: Output, node: Node) -> Node:
    """Returns a node's value as one more output."""
    output = output_node(graph_module)
    node.name = value.name
    node.meta[VALUE] = value
    output.args = ((*returned(graph_module), node),)
    return node


def emitted(graph_module: GraphModule, value: Output) -> Node | None:
    """The node that is returned as this value, None where none is."""
    return next((node for node in returned(graph_module) if node.meta.get(VALUE) == value), None)


def _label(port: Port) -> str:
    return identifier(f"{port.out} {port.base or 'itself'}")
