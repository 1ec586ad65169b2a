"""The values that passes exchange: which sites a variant computes, which it forecasts, and what a pass is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

GUIDANCE = "guidance"  # kind of the site whose forecast leaves out the unconditional half of a merged batch
STEP = "step"  # graph input [1] int64: the number of the sampler step


@dataclass(frozen=True)
class Port:
    """One cached tensor of a site: the node `out`, kept as `out - base` where `base` is named, else as it is."""

    out: str
    base: str | None = None


@dataclass(frozen=True)
class Site:
    """A value of the graph that may be cached (DESIGN: site). Pure data, valid for one captured graph.

    `shapes` are those of the recorded call; `bytes` is one anchor of all ports there; `flops` is what one forecast
    of this site saves in that call.
    """

    name: str
    kind: str
    ports: tuple[Port, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Look:
    """A number per sample that a trigger reads: the distance of a value to a reference (dcc.triggers.Measure)."""

    port: Port
    against: str
    norm: str


@dataclass(frozen=True)
class Refresh:
    """A site of which some tokens are computed afresh at some steps (passes/refresh_tokens.py).

    `decision` is the schedule's value: 1 computes the site and starts its state, 0 forecasts it with what earlier
    refreshes corrected, 2 also computes a `ratio` of the tokens with `nodes`, which take tokens from the values `ends`
    (token_wise.Region). `select` names how they are chosen, `options` are its numbers. `tokens` and `leader` are the
    value that K-means clusters and the site that keeps the labels; `last` says, where the site has more tokens than
    the model's output, whether those of the output stand last (else first).
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
        """A number of the selector."""
        return dict(self.options)[name]


@dataclass(frozen=True)
class Correction:
    """A cheap linear map of the value `source` that a site's value is kept relative to (passes/insert_correctors.py).

    `shapes` are those of its matrices [to, from], applied one after another, and of a last bias [to] if `bias`; they
    are graph inputs. The runtime makes them: the two factors of the graph input `weight` at the rank of their shapes,
    its channels weighed by the tensor `key` of `file` if one is named; or, without a `weight`, the tensors of `file`.
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

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph inputs that it takes."""
        return tuple(f"factor_{identifier(self.site)}_{self.port}_{i}" for i in range(len(self.shapes)))


@dataclass(frozen=True)
class Form:
    """How sites are forecast that are not one combination of whole anchors (forms.py)."""

    rows: ClassVar[int] = 1


@dataclass(frozen=True)
class Row:
    """One distinct row of a schedule: its sites are either computed (and written) or forecast from `anchors` values.

    `forecast` groups sites that share coefficients: group k reads row k of the coefficient input, or as many rows as
    its form takes (`forms`, one a group, None where plain; empty where all are). `watched` values are returned for a
    trigger to compare with later ones, `looks` are compared in this call. `corrections` make bases of ports. `hoisted`
    names nodes whose values come from outside (hoist_invariants.py).
    """

    computed: tuple[Site, ...] = ()
    forecast: tuple[tuple[Site, ...], ...] = ()
    anchors: int = 1
    refreshed: tuple[Refresh, ...] = ()
    watched: tuple[Port, ...] = ()
    looks: tuple[Look, ...] = ()
    forms: tuple[Form | None, ...] = ()
    corrections: tuple[Correction, ...] = ()
    hoisted: tuple[str, ...] = ()

    def form(self, group: int) -> Form | None:
        """How the group is forecast; None where it is plain."""
        return self.forms[group] if self.forms else None

    def start(self, group: int) -> int:
        """The first coefficient row of the group; of one more than there are groups, how many rows there are."""
        return sum(form.rows if form else 1 for form in map(self.form, range(group)))


@dataclass(frozen=True)
class Pass:
    """A rewrite of one graph for one row. A frozen value: options are fields, `apply` is the only verb.

    `name` is the file's stem; `after` names the passes that must have run before; `optional` passes may be skipped
    without changing what a variant takes and returns. The graph is valid (passes/verify.py) before and after.
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[bool] = False

    def apply(self, graph_module: GraphModule, row: Row) -> int:
        """Edits `graph_module` in place and returns the number of edits."""
        raise NotImplementedError


def anchor_name(site: Site, port: int, age: int) -> str:
    """Name of the graph input that holds the value of `site`'s `port`, `age` anchors ago (0 is the newest)."""
    return f"anchor_{identifier(site.name)}_{port}_{age}"


def write_name(site: Site, port: int) -> str:
    """Name of the graph output that carries the fresh value of `site`'s `port`."""
    return f"write_{identifier(site.name)}_{port}"


def watch_name(port: Port) -> str:
    """Name of the graph output that carries a watched value."""
    return f"watch_{_label(port)}"


def seen_name(port: Port, which: str | int) -> str:
    """Name of the graph input that holds a watched value of "previous" step, or `which` computed steps ago."""
    return f"seen_{_label(port)}_{which}"


def look_name(look: Look) -> str:
    """Name of the graph output that carries the number of a look."""
    return f"look_{_label(look.port)}_{look.against}_{look.norm}"


def _label(port: Port) -> str:
    return identifier(f"{port.out} {port.base or 'itself'}")


def once_name(node: str) -> str:
    """Name of the graph input that holds the value of a node that no step changes."""
    return f"once_{node}"


def state_name(kind: str, site: str = "") -> str:
    """Name of the graph input that holds state of a refresh, of one site or of the whole stream."""
    return f"state_{kind}_{identifier(site)}".rstrip("_").lower()


def next_name(state: str) -> str:
    """Name of the graph output that carries what the state of this name becomes."""
    return f"next_{state}"


def state_of(name: str) -> str | None:
    """The state whose next value the graph output of this name carries, None for other outputs."""
    return name.removeprefix("next_") if name.startswith("next_state_") else None


def identifier(text: str) -> str:
    """`text` as part of a Python identifier."""
    return "".join(c if c.isalnum() else "_" for c in text)
