"""Analysis: the values that a value is a sum of, followed back through additions, shape changes and slices of joins.

    s = cat([text [b, n, c], image [b, m, c]], 1) + f;  y = slice(s, 1, n)    -->    from y: image and f, but not text

A walk knows which part of a value it follows: what is sliced off a concatenation comes from the pieces at that place
alone, whatever the sizes of one call. Places are compared by symbols; where they cannot be, all pieces are followed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch.fx import Node

from dcc.passes.graph import along, arguments, is_tensor, op_name, shape
from dcc.passes.same_sizes import canonical, same_size
from dcc.passes.values import is_number

SHAPE_CHANGES = frozenset(
    {
        "view", "_unsafe_view", "reshape", "permute", "transpose", "slice", "split", "split_with_sizes", "chunk",
        "unbind", "cat", "unsqueeze", "squeeze", "clone", "contiguous", "expand", "flatten", "unflatten", "alias",
        "_to_copy", "to", "dropout", "select", "detach", "type_as", "t",
    }
)  # fmt: skip
SCALAR_SCALES = frozenset({"mul", "div"})
SUMS = frozenset({"add", "sub"})
LISTS = frozenset({"split", "split_with_sizes", "chunk", "unbind"})  # operators that return a list of views
SAME_PLACES = frozenset({"clone", "contiguous", "alias", "_to_copy", "to", "dropout", "detach", "type_as"})
ORDERED = frozenset({"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand", "flatten", "unflatten"})

END = 2**63 - 1  # how a slice to the end is written

Part = tuple[tuple[int, Any, Any], ...]  # (dimension, start, end) of what is followed; whole in all other dimensions


def walk(node: Node, stop: Collection[str]) -> list[Node]:
    """Nodes reached from `node` backwards along the stream, `stop` nodes included but not passed."""
    seen: dict[tuple[Node, Part], None] = {}
    todo: list[tuple[Node, Part]] = [(node, ())]
    while todo:
        found = todo.pop()
        if found not in seen:
            seen[found] = None
            todo.extend(_sources(*found) if found[0].name not in stop else ())
    return list(dict.fromkeys(node for node, _ in seen))


def tensors(node: Node) -> list[Node]:
    """Arguments of a call that carry a tensor or a list of tensors."""
    return [arg for arg in node.all_input_nodes if is_tensor(arg) or isinstance(arg.meta.get("val"), (list, tuple))]


def _sources(node: Node, part: Part) -> Iterator[tuple[Node, Part]]:
    """What a part of a value is a sum of, and which part of it; nothing where it is no sum and no change of shape."""
    name, sources = op_name(node), [source for source in tensors(node) if not is_number(source)]
    scaled = [arg for arg in node.args if isinstance(arg, Node) and not is_number(arg)]
    if name in SUMS | SAME_PLACES or (name in SCALAR_SCALES and len(scaled) == 1):
        for source in sources if name in SUMS else sources[:1]:
            dropped = len(shape(node)) - len(shape(source))
            yield (
                source,
                tuple(
                    (d - dropped, start, end)
                    for d, start, end in part
                    if d >= dropped and same_size(node.graph, shape(node)[d], shape(source)[d - dropped])
                ),
            )
    elif name == "slice":
        yield sources[0], _sliced(node, part)
    elif name == "getitem":
        yield _item(node, part)
    elif name == "cat":
        yield from _pieces(node, part)
    elif name in ("permute", "transpose", "t"):
        order = _order(node, name)
        yield sources[0], tuple((order[d], start, end) for d, start, end in part)
    elif name in SHAPE_CHANGES:
        yield sources[0], _leading(node, sources[0], part) if name in ORDERED else ()


def _sliced(node: Node, part: Part) -> Part:
    """The part of the argument of a slice that a part of the slice is."""
    given: dict[int, Any] = dict(enumerate(node.args))
    cut = along(node, 1, len(shape(node)))
    size = canonical(shape(given[0])[cut])
    start, end = (_place(value, size) for value in (given.get(2), given.get(3)))
    start, end = 0 if start is None else start, size if end is None else end
    rest = tuple(p for p in part if p[0] != cut)
    if given.get(4, 1) != 1:
        return rest
    first, last = next(((start + a, start + b) for d, a, b in part if d == cut), (start, end))
    return rest if (first, last) == (0, size) else (*rest, (cut, first, last))


def _place(value: Any, size: Any) -> Any:
    """A place along a dimension of this size, counted from its start; None for none, and for the end."""
    if isinstance(value, Node):
        value = value.meta["val"]
    if value is None or (isinstance(value, int) and isinstance(size, int) and value >= size) or value == END:
        return None
    place = canonical(value)
    negative = place < 0 if isinstance(place, int) else place.could_extract_minus_sign()
    return size + place if negative else place


def _item(node: Node, part: Part) -> tuple[Node, Part]:
    """The list that an item is taken from as its one argument, and the part of that which the item's part is."""
    taken, index = arguments(node)
    name, source = op_name(taken), tensors(taken)[:1]
    if name not in LISTS or name == "unbind" or not source:
        return taken, ()
    cut = along(taken, 2, len(shape(node)))
    sizes = [canonical(value.shape[cut]) for value in taken.meta["val"]]
    offset = sum(sizes[:index])
    first, last = next(((offset + a, offset + b) for d, a, b in part if d == cut), (offset, offset + sizes[index]))
    return source[0], (*(p for p in part if p[0] != cut), (cut, first, last))


def _pieces(node: Node, part: Part) -> Iterator[tuple[Node, Part]]:
    """The pieces of a concatenation that a part of it comes from; all of them where its ends lie at no seam."""
    pieces: list[Node] = arguments(node)[0]
    seam = along(node, 1, len(shape(node)))
    rest = tuple(p for p in part if p[0] != seam)
    seams: list[Any] = [0]
    for piece in pieces:
        seams.append(seams[-1] + canonical(shape(piece)[seam]))
    for start, end in (p[1:] for p in part if p[0] == seam):
        if all(isinstance(place, int) for place in (*seams, start, end)):
            for index, piece in enumerate(pieces):
                first, last = max(start, seams[index]), min(end, seams[index + 1])
                if first < last:
                    whole = (first, last) == (seams[index], seams[index + 1])
                    own = () if whole else ((seam, first - seams[index], last - seams[index]),)
                    yield piece, (*rest, *own)
            return
        if start in seams and end in seams:
            for piece in pieces[seams.index(start) : seams.index(end)]:
                yield piece, rest
            return
    for piece in pieces:
        yield piece, rest


def _order(node: Node, name: str) -> list[int]:
    """For each dimension of a permuted value, the dimension of the argument that it is."""
    rank = len(shape(node))
    order = list(range(rank))
    if name == "permute":
        return [d % rank for d in arguments(node)[1]]
    first, second = arguments(node)[1:3] if name == "transpose" else (0, 1)
    if rank > 1:
        order[first], order[second] = order[second], order[first]
    return order


def _leading(node: Node, source: Node, part: Part) -> Part:
    """What of a part stays the same part where values stay in order: dimensions before which nothing changes."""
    kept = 0
    for own, other in zip(shape(node), shape(source), strict=False):
        if not same_size(node.graph, own, other):
            break
        kept += 1
    return tuple(p for p in part if p[0] < kept)
