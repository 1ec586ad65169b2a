"""Discovers the sites of a captured denoiser: every value that may be cached, from module paths and data flow alone."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from rich.tree import Tree
from torch.fx import GraphModule, Node

from dcc.capture.captured import Captured
from dcc.errors import SiteError
from dcc.passes import blocks as block_analysis
from dcc.passes.base import GUIDANCE, Port, Site
from dcc.passes.blocks import Block, is_inside
from dcc.passes.costs import Cost, costs
from dcc.passes.dataflow import Dataflow
from dcc.passes.graph import nodes_by_name, op_name, returned
from dcc.passes.levels import level_cut, levels, skip_pairs
from dcc.passes.residual_stream import attention_output, base_of, branches
from dcc.passes.same_sizes import follows
from dcc.passes.side_products import PRODUCTS, SideProducts, side_products
from dcc.record.call import Call
from dcc.record.recorder import Recording
from dcc.text import human_bytes, render

RANGE = re.compile(r"^blocks\[(\d+):(\d+)\]$")
GROUPS = {
    "blocks": "the residual of each block, one site a block",
    "branches": "every branch output before its gate",
    "innermost": "every branch output before its gate, but for branches that hold others",
    "attn": "every attention branch output before its gate",
    "self": "every self-attention branch output before its gate",
    "cross": "every cross-attention branch output before its gate",
    "mlp": "every MLP branch output before its gate",
    "joint": "every output of an attention and an MLP that one projection joins",
    "heads": "every attention output before such a projection",
    "linears": "every linear layer inside the blocks whose input moves with the sample",
}
BRANCH_KINDS = {
    "branches": None,
    "innermost": None,
    "attn": ("attn", "cross", "attn+mlp"),
    "self": ("attn",),
    "cross": ("cross",),
    "mlp": ("mlp",),
    "joint": ("attn+mlp",),
}
INNERMOST = ("innermost", "self", "cross")  # without branches that hold others, as a U-Net's transformers do
AFTER = re.compile(r"^after:(\d+)$")
LINEAR = "linear"  # kind of the sites linear:<path>, which are found when first asked for
PROBE = "probe"  # kind of the sites that triggers look at and that are never cached
MIN_CUT = 0.05  # a concatenation that saves less is no skip connection worth a site


@dataclass
class Sites:
    """The sites of one captured denoiser at one recorded shape, by name; prints as a tree.

    Names: `output` (raw model output), `delta` (output minus latent), `hidden` (the value after the last block),
    `stack` (residual of all blocks), `latent` (the sampler's state) and `modulated` (what the first block's first
    product takes), these two only for triggers to look at, `<list>` (residual of one block list), `<list>.<i>`
    (residual of a block), `blocks[a:b]` (residual of blocks a to b-1 in execution order), `<block>/attn`,
    `<block>/cross`, `<block>/mlp` (branch output before its gate), `cut:k` (U-Net: the deep side of the k-th skip
    connection, 0 the outermost), `level:k` (U-Net: the cheapest cut below resolution level k), `uncond` (the output's
    unconditional half of a guided batch, relative to the other), `encoder` (U-Net: all that the decoder takes from the
    encoder), `after:i` (the value after block i, counted in execution order). Groups of sites: those of GROUPS.
    """

    captured: Captured
    call: Call
    run: Recording | None = None  # what a recorded run showed, where one was recorded
    flops: int = 0
    costs: dict[str, Cost] = field(default_factory=dict)
    named: dict[str, Site] = field(default_factory=dict)
    linears: dict[str, Site] = field(default_factory=dict)  # not in `named`: there are too many to list
    order: list[Block] = field(default_factory=list)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.named.values())

    def __len__(self) -> int:
        return len(self.named)

    def __contains__(self, name: str) -> bool:
        return name in self.named

    def __getitem__(self, name: str) -> Site:
        """The site of this name. Raises SiteError, listing near names, where there is none."""
        if name not in self.named and (match := RANGE.match(name)):
            site = self._range(name, int(match[1]), int(match[2]))
            if site is not None:
                self.named[name] = site
        if name not in self.named and (match := AFTER.match(name)) and int(match[1]) < len(self.order):
            self.named[name] = _Finder(self).value_after(name, self.order[int(match[1])])
        if name.startswith(f"{LINEAR}:") and name in (layers := self._linears()):
            return layers[name]
        if name not in self.named and name.endswith("/heads"):
            if (site := _Finder(self).heads(name)) is not None:
                self.named[name] = site
        if name == "uncond" and name not in self.named:
            raise SiteError(
                "no site 'uncond': as recorded, this denoiser is not called with a merged guidance batch "
                "[unconditional; conditional]; it has no guidance, or two calls per step, neither with a half to spare"
            )
        if name not in self.named:
            if self.captured.problem:
                raise SiteError(
                    f"no site {name!r}: this denoiser is cached at its 'output' only ({self.captured.problem})"
                )
            near = difflib.get_close_matches(name, [*self.named, *GROUPS], n=4, cutoff=0.5)
            raise SiteError(
                f"no site {name!r} in this denoiser; "
                + (f"did you mean {', '.join(map(repr, near))}? " if near else "")
                + f"Whole-model sites: {', '.join(n for n in self.named if '.' not in n)}; "
                f"groups: {', '.join(GROUPS)}; print(dcc.sites(model)) shows all"
            )
        return self.named[name]

    def select(self, name: str) -> tuple[Site, ...]:
        """The sites of a site name or group name. Raises SiteError where there are none."""
        if name == "blocks":
            found = tuple(self.named[b.path] for b in self.order if b.path in self.named)
        elif name in BRANCH_KINDS:
            kinds = BRANCH_KINDS[name]
            found = tuple(s for s in self if s.kind in kinds) if kinds else self._branches()
            if name in INNERMOST:
                units = [s.name.rpartition("/")[0] for s in self._branches()]
                found = tuple(s for s in found if not any(u.startswith(s.name.rpartition("/")[0] + ".") for u in units))
        elif name == "linears":
            found = tuple(self._linears().values())
        elif name == "heads":
            found = tuple(self[f"{s.name.removesuffix('/attn+mlp')}/heads"] for s in list(self) if s.kind == "attn+mlp")
        else:
            return (self[name],)
        if not found:
            raise SiteError(
                f"this denoiser has no sites in the group {name!r} ({GROUPS[name]}); it has: {', '.join(self.named)}"
            )
        return found

    @property
    def graph_module(self) -> GraphModule:
        """The captured graph."""
        return self.captured.graph_module

    @property
    def varying(self) -> frozenset[str]:
        """Paths of the inputs that change from step to step; none where no run was recorded."""
        return self.run.varying if self.run is not None else frozenset()

    @property
    def kept(self) -> frozenset[str]:
        """Paths of the inputs that are the very same tensors at every step."""
        return frozenset(self.run.keys) if self.run is not None else frozenset()

    @property
    def flow(self) -> Dataflow:
        """The data flow of the captured graph, which nothing edits."""
        return self._flow

    @functools.cached_property
    def _flow(self) -> Dataflow:
        return Dataflow(self.captured.graph_module)

    def _branches(self) -> tuple[Site, ...]:
        """All branches, without the attention outputs inside them, which are named when first asked for."""
        return tuple(s for s in self if "/" in s.name and s.kind != "heads")

    def share(self, site: Site) -> float:
        """Share of the call's FLOPs that a forecast of the site saves."""
        return site.flops / self.flops if self.flops else float(site.name == "output")

    @property
    def default(self) -> str:
        """The site a policy takes when none is named."""
        return next(name for name in ("stack", "cut:0", "hidden", "output") if name in self)

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Tree:
        root = Tree(f"{self.flops / 1e9:.3f} GFLOP per call, {len(self.named)} sites")
        parents: dict[str, Tree] = {}
        for site in self:
            parent = next((parents[p] for p in sorted(parents, key=len, reverse=True) if _is_child(site.name, p)), root)
            shapes = " + ".join("x".join(map(str, shape)) for shape in site.shapes)
            parents[site.name] = parent.add(
                f"[bold]{site.name}[/]  {site.kind}  {shapes}  {human_bytes(site.bytes)}  "
                f"{self.share(site):.1%} of FLOPs",
                highlight=False,
            )
        return root

    def _linears(self) -> dict[str, Site]:
        if not self.linears and self.order:
            self.linears.update((site.name, site) for site in _Finder(self).linears())
        return self.linears

    def _range(self, name: str, start: int, stop: int) -> Site | None:
        """The residual of blocks start..stop-1, None where they give no value. Raises SiteError for no such range."""
        if not 0 <= start < stop <= len(self.order):
            raise SiteError(f"{name}: this denoiser has blocks 0 to {len(self.order)}; write blocks[a:b] with a < b")
        return _Finder(self).residual(name, self.order[start:stop])


def find_sites(captured: Captured, call: Call, run: Recording | None = None, like: Sites | None = None) -> Sites:
    """All sites of `captured`, with shapes, bytes and FLOPs of the concrete `call`.

    `run` tells which inputs move and whether guidance comes as a merged batch; without it every input may move, and
    there is no guidance. `like` are those of another capture of the module: where this one has all their blocks, and no
    new ones, these are its blocks too, so that `blocks[a:b]` means the same ones at other sizes and in other states.
    """
    sites = Sites(captured, call, run)
    if not captured.problem:
        sites.costs = costs(captured.graph_module, captured.inputs_of(call))
    sites.flops = sum(cost.flops for cost in sites.costs.values())
    _Finder(sites).find(like)
    return sites


class _Finder:
    """The analyses of one graph, run once."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self.graph_module = sites.captured.graph_module
        self.nodes = nodes_by_name(self.graph_module)
        self.costs = sites.costs
        self.flow = sites.flow
        self.numbered = list(block_analysis.numbered_blocks(self.graph_module).values())
        self.moving = self.flow.depends_on(sites.captured.inputs.values())

    def find(self, like: Sites | None) -> None:
        outputs = returned(self.graph_module)
        self.add("output", "output", [Port(node.name) for node in dict.fromkeys(outputs)])
        if self.sites.captured.problem:
            return
        self.latent(outputs)
        same = self.same_blocks(like)
        found = block_analysis.outermost_blocks(self.graph_module, self.lasting) if same is None else same
        self.sites.order = found
        self.hidden()
        if self.sites.order:
            self.stacks()
            self.modulated()
        self.cuts()
        for block in self.sites.order:
            self.add_site(self.residual(block.path, [block]))
            self.branches(block)

    def same_blocks(self, like: Sites | None) -> list[Block] | None:
        """The blocks of another capture; None where this one lacks some, or has new numbered modules beside them."""
        if like is None or like.captured.problem:
            return None
        known, before = (
            {block.path: block for block in self.numbered},
            block_analysis.numbered_blocks(like.graph_module),
        )
        paths = [block.path for block in like.order]
        new = [path for path in known if path not in before]
        if not all(path in known for path in paths) or not all(any(is_inside(n, p) for p in paths) for n in new):
            return None
        return [known[path] for path in paths]

    @functools.cached_property
    def side(self) -> SideProducts:
        """The products of adapters beside those of the denoiser's own layers."""
        return side_products(self.graph_module)

    @property
    def lasting(self) -> dict[str, Cost]:
        """The costs that every state of the module has, adapters or none: of values made of the call's own inputs."""
        return {
            name: replace(cost, flops=cost.flops if name in self.moving and name not in self.side.at_side else 0)
            for name, cost in self.costs.items()
        }

    @property
    def sample(self) -> str:
        """The graph input that carries the sampler's state: shaped like the output, or else the largest that moves."""
        output = returned(self.graph_module)[0]

        def likeness(item: tuple[str, str]) -> tuple[bool, bool, int]:
            return self.varies(item[0]), follows(output, self.nodes[item[1]]), self.costs[item[1]].bytes

        return max(self.sites.captured.inputs.items(), key=likeness)[1]

    def latent(self, outputs: Sequence[Node]) -> None:
        """Adds the sampler's state itself, the output relative to it where their shapes agree, and `uncond`."""
        self.add("latent", PROBE, [Port(self.sample)])
        if len(outputs) == 1 and follows(outputs[0], self.nodes[self.sample]):
            self.add("delta", "residual", [Port(outputs[0].name, self.sample)])
        if (
            self.sites.run is not None
            and self.sites.run.guided
            and len(outputs) == 1
            and not self.sites.captured.batch.isdigit()
        ):
            size, half = self.costs[outputs[0].name], self.sites.flops // 2
            shape = (size.shape[0] // 2, *size.shape[1:])
            self.add_site(Site("uncond", GUIDANCE, (Port(outputs[0].name),), (shape,), size.bytes // 2, half))

    def modulated(self) -> None:
        """Adds what the first block's first matrix product or convolution over the sample's tokens or pixels takes."""
        inside, moved = self.sites.order[0].nodes, self.flow.depends_on([self.sample])
        for node in self.graph_module.graph.nodes:
            if node.name in inside and op_name(node) in PRODUCTS and node.all_input_nodes[0].name in moved:
                self.add("modulated", PROBE, [Port(node.all_input_nodes[0].name)])
                return

    def hidden(self) -> None:
        """Adds the value after the last block if all data flows through it, else the narrowest late value it passes."""
        chain = self.flow.dominators(self.sample)
        inside = self.sites.order[-1].nodes if self.sites.order else frozenset()

        def late(name: str) -> bool:
            return bool(self.costs[name].bytes) and self.saved([Port(name)]) >= 0.5 * self.sites.flops

        found = next((name for name in chain if name in inside and late(name)), None)
        if found is None:
            others = filter(late, chain)
            found = min(others, key=lambda name: (-self.saved([Port(name)]), self.costs[name].bytes), default=None)
        if found is not None and found not in {port.out for port in self.sites["output"].ports}:
            self.add("hidden", "value", [Port(found)])

    def varies(self, path: str) -> bool:
        """Whether an input changes from step to step, as far as the recorded run showed."""
        return path in self.sites.varying if self.sites.varying else True

    def stacks(self) -> None:
        order = self.sites.order
        self.add_site(self.residual("stack", order), residual_only=True)
        lists = list(dict.fromkeys(block.stack for block in order))
        if len(lists) > 1:
            for path in lists:
                self.add_site(self.residual(path, [b for b in order if b.stack == path]), residual_only=True)

    def cuts(self) -> None:
        pairs = skip_pairs(self.graph_module, self.flow)
        skips = [newer for newer, _ in pairs if self.saved([Port(newer)]) >= MIN_CUT * self.sites.flops]
        for index, name in enumerate(skips):
            self.add(f"cut:{index}", "cut", [Port(name)])
        if len(pairs) > 1:  # the last pair is the innermost: its newer side is the output of the middle blocks
            taken = [older for _, older in pairs] + [pairs[-1][0]]
            self.add("encoder", "cut", [Port(name) for name in dict.fromkeys(taken)])
        all_levels = levels(self.graph_module, self.costs)
        for level in range(1, len(all_levels)):
            names = level_cut(level, all_levels, self.flow, self.costs)
            if names:
                self.add(f"level:{level}", "cut", [Port(name) for name in names])

    def residual(self, name: str, consecutive: list[Block]) -> Site | None:
        inside = block_analysis.region(consecutive)
        entering = [n for n in block_analysis.entering(self.nodes, inside) if n.name in self.moving]
        ports = []
        for node in block_analysis.leaving(self.nodes, inside, self.moving):
            base = base_of(node, entering)
            ports.append(Port(node.name, base.name if base is not None else None))
        return self.site(name, "residual" if any(port.base for port in ports) else "value", ports) if ports else None

    def value_after(self, name: str, block: Block) -> Site:
        """The site of the values that leave a block, kept as they are and not as a residual."""
        leaving = block_analysis.leaving(self.nodes, set(block.nodes), self.moving)
        return self.site(name, "value", [Port(node.name) for node in leaving])

    def branches(self, block: Block) -> None:
        """Adds the branches of the block and of the numbered blocks nested in it, named by kind in execution order."""
        for unit in (b for b in self.numbered if block_analysis.is_inside(b.path, block.path)):
            inside = set(unit.nodes)
            stop = {n.name for n in block_analysis.entering(self.nodes, inside) if n.name in self.moving}
            found = {}
            for node in block_analysis.leaving(self.nodes, inside, self.moving):
                for branch in branches(node, stop, unit.nodes):
                    found.setdefault(branch.addition.name, branch)
            counts: dict[str, int] = {}
            for branch in found.values():
                taken = {port.out for site in self.sites for port in site.ports if "/" in site.name}
                if branch.value.name in taken or branch.value.name not in self.moving:
                    continue
                count = counts[branch.kind] = counts.get(branch.kind, 0) + 1
                label = branch.kind if count == 1 else f"{branch.kind}.{count - 1}"
                self.add(f"{unit.path}/{label}", branch.kind, [Port(branch.value.name)])

    def linears(self) -> list[Site]:
        """Sites of the outputs of linear layers inside the blocks, over tokens or pixels that move with the sample."""
        inside = frozenset().union(*(block.nodes for block in self.sites.order))
        moved = self.flow.depends_on([self.sample])
        found: dict[str, Node] = {}
        for node in self.graph_module.graph.nodes:
            if node.name in self.side.at_side or op_name(node) != "linear" or len(self.costs[node.name].shape) <= 2:
                continue
            if node.name in inside & moved:
                path = self.layer(node)
                count = sum(name.split("#")[0] == path for name in found)
                found[f"{path}#{count}" if count else path] = self.side.whole.get(node.name) or node
        return [self.site(f"{LINEAR}:{path}", LINEAR, [Port(node.name)]) for path, node in found.items()]

    def layer(self, product: Node) -> str:
        """Path of the layer that gives a product: of the module that adds what is at its side, or only wraps it."""
        if product.name in self.side.whole:
            return block_analysis.paths(self.side.whole[product.name])[-1]
        around = block_analysis.paths(product) or [product.name]
        return next((path for path in around if self.members.get(path) == {product.name}), around[-1])

    @functools.cached_property
    def members(self) -> dict[str, set[str]]:
        """Names of the nodes inside every module, by path."""
        return block_analysis.members(self.graph_module)

    def heads(self, name: str) -> Site | None:
        """The site of what attention gives to the projection that it shares with an MLP; None where it shares none."""
        block = next((b for b in self.numbered if b.path == name.removesuffix("/heads")), None)
        if block is None or f"{block.path}/attn+mlp" not in self.sites:
            return None
        value = self.nodes[self.sites[f"{block.path}/attn+mlp"].ports[0].out]
        found = attention_output(value, block.nodes)
        return self.site(name, "heads", [Port(found.name)]) if found is not None else None

    def saved(self, ports: list[Port]) -> int:
        return sum(self.costs[name].flops for name in self.flow.spared(ports) if name in self.costs)

    def site(self, name: str, kind: str, ports: list[Port]) -> Site:
        facts = [self.costs.get(port.out, Cost(0, 0, ())) for port in ports]
        return Site(
            name,
            kind,
            tuple(ports),
            tuple(fact.shape for fact in facts),
            sum(fact.bytes for fact in facts),
            self.saved(ports),
        )

    def add(self, name: str, kind: str, ports: list[Port]) -> None:
        self.add_site(self.site(name, kind, ports))

    def add_site(self, site: Site | None, residual_only: bool = False) -> None:
        if site is not None and not (residual_only and site.kind != "residual"):
            self.sites.named[site.name] = site


def _is_child(name: str, parent: str) -> bool:
    return "/" not in parent and name != parent and name.startswith((parent + ".", parent + "/"))
