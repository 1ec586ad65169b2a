"""Analysis: the repeated blocks of a denoiser and the values that enter and leave them, from module paths.

A block is a module whose path ends in a number (a ModuleList's child): `transformer_blocks.3`. Outermost blocks
follow each other in execution order; nothing here knows a model class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from dcc.passes.costs import Cost
from dcc.passes.graph import is_tensor
from dcc.torch_internals import module_stack

NUMBERED = re.compile(r"(?:^|\.)\d+$")
MIN_SHARE = 0.02  # a stack with less of the FLOPs is an embedder or a head, not a stack of blocks


@dataclass(frozen=True)
class Block:
    """One numbered module call: its path and the names of its nodes."""

    path: str
    nodes: frozenset[str]

    @property
    def stack(self) -> str:
        """Path of the list that holds the block."""
        return self.path.rpartition(".")[0]


def paths(node: Node) -> list[str]:
    """Paths of the modules around `node`, outermost first, the denoiser itself ("") left out."""
    return [path.split("@")[0] for path, _ in module_stack(node).values() if path]


def members(graph_module: GraphModule) -> dict[str, set[str]]:
    """Names of the nodes inside every module, by path, in execution order."""
    found: dict[str, set[str]] = {}
    for node in graph_module.graph.nodes:
        for path in paths(node):
            found.setdefault(path, set()).add(node.name)
    return found


def numbered_blocks(graph_module: GraphModule) -> dict[str, Block]:
    """Every numbered module at any depth, by path, in execution order."""
    inside = members(graph_module).items()
    return {path: Block(path, frozenset(names)) for path, names in inside if NUMBERED.search(path)}


def outermost_blocks(graph_module: GraphModule, costs: Mapping[str, Cost]) -> list[Block]:
    """Numbered modules that lie in no other numbered one, in execution order; no stacks with under 2% of the FLOPs."""
    blocks = numbered_blocks(graph_module)
    outer = [b for b in blocks.values() if not any(is_inside(b.path, other) for other in blocks if other != b.path)]
    total = sum(cost.flops for cost in costs.values()) or 1
    weight: dict[str, int] = {}
    for block in outer:
        weight[block.stack] = weight.get(block.stack, 0) + sum(costs[name].flops for name in block.nodes)
    return [block for block in outer if weight[block.stack] >= MIN_SHARE * total]


def is_inside(path: str, other: str) -> bool:
    """Whether the module at `path` is `other` or part of it."""
    return path == other or path.startswith(other + ".")


def region(blocks: Iterable[Block]) -> set[str]:
    """Names of the nodes of consecutive blocks."""
    return set().union(*(block.nodes for block in blocks))


def leaving(nodes: Mapping[str, Node], inside: set[str], moving: set[str]) -> list[Node]:
    """Tensors made in the region that change from step to step (`moving`) and are used outside, in graph order."""
    found = (nodes[name] for name in inside & moving)
    return sorted(n for n in found if is_tensor(n) and any(user.name not in inside for user in n.users))


def entering(nodes: Mapping[str, Node], inside: set[str]) -> list[Node]:
    """Tensors made outside the region and used inside, in graph order."""
    sources = {source for name in inside for source in nodes[name].all_input_nodes if source.name not in inside}
    return sorted(source for source in sources if is_tensor(source))
