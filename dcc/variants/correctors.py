"""Correctors: sites kept relative to a cheap linear map of a live value, from a plan's forms to the maps' factors.

- {"corrector": {"kind": "low_rank", "rank": 16, "channels": path or null}}, for sites of kind "linear": the value is
  kept relative to x W_r, W_r being the approximation of the layer's live weight W at that rank. With y_c and x_c of the
  anchor, the forecast y_c - x_c W_r + x W_r is y_c + (x - x_c) W_r, which is ICC (arXiv 2505.05829), and one tensor is
  kept instead of two. `channels` is a safetensors file of one tensor [C] per site: how much each channel of x matters.
- {"corrector": {"kind": "linear", "weights": path}}, for residual sites: what a block does is kept relative to a
  linear map of its input that was fitted before: `<site>.weight` [C, C] and `<site>.bias` [C] in a safetensors file,
  and `<site>.<port>.weight` for further values of the site. FastCache (arXiv 2505.20353) takes the map alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dcc.discover.sites import LINEAR, Sites
from dcc.errors import PlanError
from dcc.files import check_regular
from dcc.passes.base import Correction, Port, Site
from dcc.passes.graph import arguments, is_tensor, nodes_by_name, op_name
from dcc.passes.side_products import side_products
from dcc.plans.forms import CorrectorForm, Form
from dcc.torch_internals import version

LARGEST = 2**40  # bytes of a file of maps, of which only what a site needs is read


def corrections(form: Form | None, group: Sequence[Site], sites: Sites) -> list[Correction]:
    """The maps that a form puts beside the sites of a group, none for other forms.

    Raises PlanError for sites that are not of the right kind, and for files that cannot be read or do not fit.
    """
    if not isinstance(form, CorrectorForm):
        return []
    make = _low_rank if form.map == "low_rank" else _linear
    return [correction for site in group for correction in make(form, site, sites)]


def corrected(site: Site, made: Sequence[Correction], live: bool = True) -> Site:
    """The site with its ports relative to the maps, or, where not `live`, to the values that the maps take.

    The second is for analyses of the captured graph, which has no maps.
    """
    own = {c.port: c for c in made if c.site == site.name}
    if not own:
        return site
    bases = {index: c.name if live else c.source for index, c in own.items()}
    ports = (Port(p.out, bases.get(index, p.base)) for index, p in enumerate(site.ports))
    return replace(site, ports=tuple(ports))


def map_flops(made: Sequence[Correction], sites: Sites) -> int:
    """FLOPs of the maps in one call; every step runs them."""
    total = 0
    for correction in made:
        rows = torch.Size(sites.costs[correction.source].shape[:-1]).numel()
        total += sum(2 * rows * torch.Size(size).numel() for size in correction.shapes if len(size) == 2)
    return total


class Factors:
    """The matrices of maps, on the device of the weights; made when first asked for, and again for another weight.

    A weight that is changed in place unseen by autograd (`weight.data += ...`) is not noticed: the map then stays
    the old one, which makes forecasts a little worse and computed steps no different.
    """

    def __init__(self) -> None:
        self.made: dict[Correction, tuple[Any, tuple[Tensor, ...]]] = {}

    def of(self, correction: Correction, weight: Tensor, own: bool) -> tuple[Tensor, ...]:
        """A map's matrices with the device and dtype of `weight`; made of it where it is the map's `own` weight."""
        key = ((weight.data_ptr(), version(weight)) if own else None, weight.device, weight.dtype)
        known = self.made.get(correction)
        if known is None or known[0] != key:
            made = low_rank(correction, weight) if own else _from_file(correction)
            self.made[correction] = known = (key, tuple(m.to(weight.device, weight.dtype) for m in made))
        return known[1]


def low_rank(correction: Correction, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The factors [r, in] and [out, r] of the best approximation of a weight [out, in] at the correction's rank.

    Best in the Frobenius norm, with columns weighed by how much their channels matter if that is known (ICC's
    channel-aware SVD). Float32.
    """
    matrix = weight.detach().float()
    scaled = matrix
    if correction.file:
        scaled = matrix * _tensors(correction.file, [correction.key])[0].to(matrix).abs()
    left = torch.linalg.svd(scaled, full_matrices=False).U[:, : correction.shapes[0][0]]
    return left.T @ matrix, left


def _from_file(correction: Correction) -> tuple[Tensor, ...]:
    return tuple(_tensors(correction.file, [f"{correction.key}.weight", f"{correction.key}.bias"]))


def _low_rank(form: CorrectorForm, site: Site, sites: Sites) -> list[Correction]:
    nodes = nodes_by_name(sites.captured.graph_module)
    if site.kind != LINEAR:
        raise PlanError(f"{site.name!r} is no linear layer, which a low-rank corrector needs; choose 'linears'")
    value = nodes[site.ports[0].out]  # an adapter adds to what the layer's own weight gives
    product = value if op_name(value) == "linear" else side_products(sites.graph_module).product(value)
    source, weight = arguments(product)[:2]
    if weight.op != "placeholder":
        raise PlanError(f"{site.name!r}: the layer's weight is computed in the graph, so it has no factors beforehand")
    out, channels = weight.meta["val"].shape
    rank = min(form.rank, int(out), int(channels))
    path, shapes = form.channels or "", ((rank, int(channels)), (int(out), rank))
    if path and (found := _tensors(path, [site.name])[0].shape) != (channels,):
        raise PlanError(f"{path}: {site.name!r} has shape {list(found)}; the layer takes {channels} channels")
    return [Correction(site.name, 0, source.name, shapes, weight.name, path, site.name if path else "")]


def _linear(form: CorrectorForm, site: Site, sites: Sites) -> list[Correction]:
    nodes = nodes_by_name(sites.captured.graph_module)
    found = []
    for index, port in enumerate(site.ports):
        if port.base is None or not is_tensor(nodes[port.base]) or len(site.shapes[index]) != 3:
            raise PlanError(f"{site.name!r} is no residual of tokens, of which a linear corrector maps every one")
        key = site.name if index == 0 else f"{site.name}.{index}"
        channels, out = (sites.costs[name].shape[-1] for name in (port.base, port.out))
        shapes = ((out, channels), (out,))
        given = [tuple(t.shape) for t in _tensors(form.weights, [f"{key}.weight", f"{key}.bias"])]
        if tuple(given) != shapes:
            raise PlanError(f"{form.weights}: {key!r} has shapes {given}; the site needs {list(shapes)}")
        found.append(Correction(site.name, index, port.base, shapes, file=form.weights, key=key))
    return found


def _tensors(path: str, names: Sequence[str]) -> list[Tensor]:
    check_regular(path, PlanError, LARGEST)
    try:
        with safe_open(os.fspath(path), "pt") as file:
            missing = [name for name in names if name not in file.keys()]
            if missing:
                raise PlanError(f"{path}: has no tensor {', '.join(map(repr, missing))}")
            found = [file.get_tensor(name) for name in names]
    except (OSError, KeyError, RuntimeError, TypeError, ValueError, SafetensorError) as error:  # odd dtypes too
        raise PlanError(f"{path}: cannot be read as safetensors: {error}") from error
    for name, tensor in zip(names, found, strict=True):
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise PlanError(f"{path}: the tensor {name!r} holds NaN, infinity or no numbers with a fraction")
    return found
