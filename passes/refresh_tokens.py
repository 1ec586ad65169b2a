"""Computes some tokens of forecast sites afresh, and keeps what that corrected for the forecasts that follow.

    h = linear(x1, w); return (add(x1, h),)          # h is a site that the row forecasts, and refreshes at random
-->
    c is an input;  r = add(h, c);  i = top(random_score(step, r, 0), 0.25);  f = linear(gather(x1, i), w)
    m = scatter(r, i, f);  return (add(x1, m), clone(sub(m, h)))

`h` stands for the forecast: insert_cache_reads, which comes later, replaces it by the read. The correction c is what
refreshes have changed since the site was computed, a tensor like the site; it starts at zero where the site is
computed. With a forecast by copy it has the effect of scattering fresh tokens into the newest anchor; with any other
predictor the forecast's trend is kept. The other state is: ages of tokens [B, N], K-means labels [B, N], how often a
token was dropped [B, N]. All numbers of tokens are static and indices stay on the device. Refuses a site or a region
whose nodes are not in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from dcc.decisions import Decision
from dcc.kernels import select_tokens as tokens
from dcc.passes.base import Order, Pass, Refresh
from dcc.passes.graph import insert_call, node_of, nodes_by_name, output_node, returned, shape, sizes
from dcc.passes.values import Input, Next, State, Step, declare, emit

aten = torch.ops.aten


@dataclass(frozen=True)
class Refreshes(Order):
    """What is done with each site whose tokens may be computed afresh."""

    refreshes: tuple[Refresh, ...]


class RefreshTokens(Pass):
    """Computes some tokens of forecast sites, and keeps what that corrected."""

    name: ClassVar[str] = "refresh_tokens"
    takes = Refreshes
    after: ClassVar[tuple[str, ...]] = ("insert_cache_writes",)

    def apply(self, graph_module: GraphModule, order: Refreshes) -> int:
        editor = _Editor(graph_module)
        for refresh in order.refreshes:
            for name in (refresh.site.ports[0].out, *refresh.nodes, *refresh.ends):
                node_of(editor.nodes, name, self.name)
        for refresh in sorted(order.refreshes, key=editor.value_of):
            if refresh.decision == Decision.COMPUTE:
                editor.start(refresh)
            else:
                editor.forecast(refresh)
        noisy = [refresh for refresh in order.refreshes if refresh.select == "noise"]
        if noisy:
            editor.look_ahead(noisy[0])
        return len(order.refreshes)


class _Editor:
    """One graph being edited. New calls are inserted before `here`, in execution order."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = graph_module
        self.nodes = nodes_by_name(graph_module)
        self.output = output_node(graph_module)
        self.here: Node = self.output
        self.merged: dict[Node, Node] = {}  # from a refreshed site's value to what stands for it now
        self.asked: tuple[Node, Node] | None = None  # scores from the output of the step before, and what they chose

    def value_of(self, refresh: Refresh) -> Node:
        return self.nodes[refresh.site.ports[0].out]

    def start(self, refresh: Refresh) -> None:
        """Starts the state of a computed site: nothing is corrected, no token has aged, the tokens are clustered."""
        self.here = self.output
        out, name = self.value_of(refresh), refresh.site.name
        self.keep(State("correction", name), self.call(aten.zeros_like.default, out))
        if refresh.select == "norm":
            self.keep(State("age", name), self.numbers(out, tokens.ages, out))
        if refresh.leader == name:
            labels = self.numbers(out, tokens.cluster, self.nodes[refresh.tokens], int(refresh.option("clusters")))
            self.keep(State("labels", name), labels)

    def forecast(self, refresh: Refresh) -> None:
        """Adds to a forecast site what earlier refreshes corrected, and fresh tokens where the row asks for them."""
        out, state = self.value_of(refresh), State("correction", refresh.site.name)
        users = list(out.users)
        self.here = out.next
        value = self.call(aten.add.Tensor, out, self.input(state, out.meta["val"]))
        if refresh.decision == Decision.REFRESH:
            value = self.fresh(refresh, value)
            self.keep(state, self.call(aten.sub.Tensor, value, out))
        for user in users:
            user.replace_input_with(out, value)
        self.merged[out] = value

    def fresh(self, refresh: Refresh, value: Node) -> Node:
        """`value` with the chosen tokens computed afresh."""
        labels = None
        if refresh.select == "cluster":
            clusters = int(refresh.option("clusters"))
            labels = self.input(State("labels", refresh.leader), self.per_token(value, torch.int64))
            score = self.numbers(value, tokens.random_score, self.step(), value, refresh.salt)
            index = self.index(value, clusters, tokens.one_a_cluster, score, labels, clusters)
        elif refresh.select == "noise":
            index = self.asked_for(refresh, value)
        else:
            index = self.top(refresh, value)
        computed = self.copied(refresh, index)
        if labels is not None and refresh.option("share"):
            value = self.call(tokens.spread, value, labels, computed, refresh.option("share"))
        return self.call(tokens.scatter, value, index, computed)

    def top(self, refresh: Refresh, value: Node) -> Node:
        """Index of the tokens with the largest scores; scores by norm grow with the time that a token has waited."""
        count = tokens.count(refresh.ratio, sizes(value)[1])
        if refresh.select == "random":
            score = self.numbers(value, tokens.random_score, self.step(), value, refresh.salt)
            return self.index(value, count, tokens.top, score, refresh.ratio)
        state = State("age", refresh.site.name)
        age = self.input(state, self.per_token(value, torch.float32))
        score = self.numbers(value, tokens.norm_score, value, int(refresh.option("sign")))
        score = self.call(tokens.aged, score, age, refresh.option("age"))
        index = self.index(value, count, tokens.top, score, refresh.ratio)
        self.keep(state, self.numbers(value, tokens.older, age, index))
        return index

    def asked_for(self, refresh: Refresh, value: Node) -> Node:
        """Index of the tokens that the output of the step before asked for, in the site's own numbering."""
        if self.asked is None:
            here, output = self.here, returned(self.graph_module)[0]
            score = self.input(State("noise"), self.per_token(output, torch.float32))
            self.here = score.next
            while self.here.op == "placeholder":
                self.here = self.here.next
            count = tokens.count(refresh.ratio, sizes(output)[1])
            self.asked = score, self.index(output, count, tokens.top, score, refresh.ratio)
            self.here = here
        score, index = self.asked
        if refresh.last is None:
            return index
        count = sizes(index)[1] + sizes(value)[1] - sizes(score)[1]
        return self.index(value, count, tokens.joined, index, score, value, refresh.last)

    def look_ahead(self, refresh: Refresh) -> None:
        """Scores the tokens of this call's output for the next step."""
        self.here, output = self.output, returned(self.graph_module)[0]
        drops = self.numbers(output, tokens.ages, output)
        if self.asked is not None:
            state = self.input(State("drops"), self.per_token(output, torch.float32))
            drops = self.numbers(output, tokens.dropped, state, self.asked[1])
        self.keep(State("drops"), drops)
        options = refresh.option("starvation"), int(refresh.option("sign"))
        self.keep(State("noise"), self.numbers(output, tokens.noise_score, output, drops, *options))

    def copied(self, refresh: Refresh, index: Node) -> Node:
        """The site's value on the chosen tokens: a copy of its region, given those tokens of the values at its ends."""
        ends = {self.merged.get(self.nodes[name], self.nodes[name]) for name in refresh.ends}
        own: dict[Node, Node] = {}

        def chosen(node: Node) -> Node:
            if node in ends and node not in own:
                own[node] = self.call(tokens.gather, node, index)
            return own.get(node, node)

        for name in refresh.nodes:
            node = self.nodes[name]
            args, kwargs = map_arg((node.args, node.kwargs), chosen)
            own[node] = self.call(cast("Callable[..., Any]", node.target), *args, **kwargs)
        return own[self.value_of(refresh)]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        with self.graph_module.graph.inserting_before(self.here):
            return insert_call(self.graph_module, target, *args, **kwargs)

    def numbers(self, value: Node, target: Callable[..., Any], *args: Any) -> Node:
        """A call that gives one number per token of `value`."""
        dtype = torch.int64 if target is tokens.cluster else torch.float32
        return self._known(self.per_token(value, dtype), target, *args)

    def index(self, value: Node, count: int, target: Callable[..., Any], *args: Any) -> Node:
        """A call that gives an index of `count` tokens."""
        return self._known(value.meta["val"].new_empty((shape(value)[0], count), dtype=torch.int64), target, *args)

    def _known(self, val: Tensor, target: Callable[..., Any], *args: Any) -> Node:
        """A call whose result is like `val`. It is not run on fake tensors: it would fix symbolic numbers of tokens."""
        with self.graph_module.graph.inserting_before(self.here):
            node = self.graph_module.graph.call_function(target, args)
        node.meta["val"] = val
        return node

    @staticmethod
    def per_token(value: Node, dtype: torch.dtype) -> Tensor:
        return value.meta["val"].new_empty(shape(value)[:2], dtype=dtype)

    def input(self, value: Input, val: Tensor) -> Node:
        return declare(self.graph_module, value, torch.empty_like(val, memory_format=torch.contiguous_format))

    def step(self) -> Node:
        return self.input(Step(), returned(self.graph_module)[0].meta["val"].new_empty((1,), dtype=torch.int64))

    def keep(self, state: State, value: Node) -> None:
        """Returns the next value of a state as an output: a contiguous copy, like a write."""
        here, self.here = self.here, self.output
        kept = self.call(aten.clone.default, value, memory_format=torch.contiguous_format)
        emit(self.graph_module, Next(state), kept)
        self.here = here
