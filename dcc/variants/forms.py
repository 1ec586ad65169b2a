"""What the forms of a plan ask passes to do with the sites of one graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dcc.errors import PlanError
from dcc.kernels.band_split import fitted
from dcc.kernels.combine import channel_dim
from dcc.passes.base import Form as PassForm
from dcc.passes.base import Site
from dcc.passes.forms import Bands, Clusters
from dcc.plans.forms import BandsForm, ClustersForm, Form


def form_of(form: Form | None, sites: Sequence[Site], name: str) -> PassForm | None:
    """How passes forecast these sites, None where they are plain; `name` is their selector.

    Raises PlanError where the form does not fit one of them.
    """
    if isinstance(form, BandsForm):
        for site in sites:
            _check_bands(form, site)
        return Bands(form.transform, float(form.cutoff), form.grid)
    if isinstance(form, ClustersForm):
        for site in sites:
            for shape in site.shapes:
                if (channels := shape[channel_dim(len(shape))]) != len(form.of_channel):
                    raise PlanError(
                        f"{name!r}: clusters of {len(form.of_channel)} channels do not fit {site.name!r}, which has a "
                        f"value of {channels}; choose a site of one value"
                    )
        return Clusters(form.of_channel)
    return None


def _check_bands(form: BandsForm, site: Site) -> None:
    shape = max(site.shapes, key=math.prod)
    if len(shape) < 3 or (form.transform == "fft" and len(shape) != 3):
        raise PlanError(
            f"{site.name!r} has shape {list(shape)}; bands by {form.transform!r} need "
            f"{'[batch, tokens, channels]' if form.transform == 'fft' else 'tokens or pixels'}"
        )
    if form.transform == "dct" and len(shape) == 3:
        try:
            fitted(form.grid, shape[1])
        except PlanError as error:
            raise PlanError(f"{site.name!r}: {error}") from error
