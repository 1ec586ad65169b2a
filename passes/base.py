"""The values that passes exchange: which sites a variant computes, which it forecasts, and what a pass is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule

GUIDANCE = "guidance"  # kind of the site whose forecast leaves out the unconditional half of a merged batch
SITES, VARIANT, LOWERING = "sites", "variant", "lowering"  # stages: when a pass runs, see passes/__init__.py


@dataclass(frozen=True)
class Port:
    """One cached tensor of a site: the node `out`, kept as `out - base` where `base` is named, else as it is."""

    out: str
    base: str | None = None


@dataclass(frozen=True)
class Site:
    """A value of the graph that may be cached. Pure data, valid for one captured graph.

    `shapes` are those of its ports in the recorded call; `bytes` is the size of one anchor of all ports there; `flops`
    is what one forecast of this site saves in that call.
    """

    name: str
    kind: str
    ports: tuple[Port, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Look:
    """A number per sample that a trigger reads: the distance of a value to a reference (dcc.plans.triggers.Measure)."""

    port: Port
    against: str
    norm: str


@dataclass(frozen=True)
class Refresh:
    """A site of which some tokens are computed afresh at some steps (passes/refresh_tokens.py).

    `decision` is the schedule's value: 1 computes the site and starts its state, 0 forecasts it with what earlier
    refreshes corrected, 2 also computes a `ratio` of the tokens with `nodes`, which take tokens from the values `ends`
    (token_wise.Region). `select` names how these tokens are chosen, `options` are the numbers of that choice. `tokens`
    is the value that K-means clusters, `leader` the site that keeps the labels. Where the site has more tokens than the
    model's output, `last` says whether those of the output come last (else first).
    """

    site: Site
    decision: int
    select: str
    ratio: float
    nodes: tuple[str, ...] = ()
    ends: frozenset[str] = frozenset()
    options: tuple[tuple[str, float], ...] = ()
    salt: int = 0
    tokens: str = ""
    leader: str = ""
    last: bool | None = None

    def option(self, name: str) -> float:
        """The number called `name` among the options."""
        return dict(self.options)[name]


@dataclass(frozen=True)
class Correction:
    """A cheap linear map of the value `source` that a site's value is kept relative to (passes/insert_correctors.py).

    `shapes` are those of its matrices [to, from], applied one after another, and of a last bias [to] if `bias`; they
    are graph inputs. The runtime makes them. With a `weight` they are the two factors of that graph input at the rank
    of the shapes, its channels weighed by the tensor `key` of `file` if one is named; without, the tensors of `file`.
    """

    site: str
    port: int
    source: str
    shapes: tuple[tuple[int, ...], ...]
    weight: str = ""
    file: str = ""
    key: str = ""

    @property
    def bias(self) -> bool:
        """Whether the last input is a bias."""
        return len(self.shapes[-1]) == 1

    @property
    def name(self) -> str:
        """Name of the node that carries the map's value."""
        return f"map_{identifier(self.site)}_{self.port}"


@dataclass(frozen=True)
class Form:
    """How to forecast sites that are not one combination of whole anchors (forms.py)."""

    @property
    def rows(self) -> int:
        """Number of coefficient rows that it takes."""
        return 1


@dataclass(frozen=True)
class Group:
    """Sites that share coefficients: row `first` of the coefficient input, or as many rows from there as `form` takes.

    `form` says how they are forecast where that is not one combination of whole anchors, and is None where it is.
    """

    sites: tuple[Site, ...]
    first: int = 0
    form: Form | None = None


@dataclass(frozen=True)
class Table:
    """The size of the coefficient input: `rows` of forecasts, each of at most `anchors` values."""

    rows: int = 1
    anchors: int = 1


class Order:
    """What is asked of one pass. Each pass that follows orders defines its own kind, as a dataclass."""


@dataclass(frozen=True)
class Row:
    """What is to be done to one graph: at most one order of each kind, read by the pass that it is for."""

    orders: tuple[Order, ...] = ()

    def order(self, kind: type[Order]) -> Order | None:
        """The order of this kind, None where the row asks nothing of its pass."""
        return next((order for order in self.orders if type(order) is kind), None)


@dataclass(frozen=True)
class Pass:
    """A rewrite of one graph. A frozen value: options are fields, `apply` is the only verb.

    `name` is the file's stem; `takes` is the kind of order that it follows, None where it does the same for every row;
    `after` names the passes that must have run before; `optional` passes may be skipped without changing what a variant
    takes and returns. The graph is valid (passes/verify.py) before and after.
    """

    name: ClassVar[str]
    takes: ClassVar[type[Order] | None] = None
    after: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[bool] = False
    stage: ClassVar[str] = VARIANT

    def apply(self, graph_module: GraphModule, order: Any) -> int:
        """Edits `graph_module` in place as its order says, and returns the number of edits."""
        raise NotImplementedError

    def run(self, graph_module: GraphModule, row: Row) -> int:
        """Applies the pass as far as the row asks for it."""
        order = row.order(self.takes) if self.takes is not None else None
        return 0 if self.takes is not None and order is None else self.apply(graph_module, order)


def identifier(text: str) -> str:
    """`text` as part of a Python identifier, for names that people read."""
    return "".join(c if c.isalnum() else "_" for c in text)
