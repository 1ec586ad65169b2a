"""True values of one site in one uncached run, for policies that read features themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcc import arguments
from dcc.discover.subject import Subject
from dcc.errors import ProfileError
from dcc.measure.finite import all_finite
from dcc.passes.base import Row
from dcc.passes.insert_cache_writes import Writes
from dcc.passes.values import Write
from dcc.record.call import bind
from dcc.record.seam import Handler
from dcc.record.target import installed
from dcc.serve.binding import Binding, Tables
from dcc.torch_internals import pytree
from dcc.variants.observe import Observer
from dcc.variants.variant import variant


def recorded_values(subject: Subject, site: str, prompt: Any, seed: int) -> Tensor:
    """Values [steps, batch, ...] of a site's largest port, on the CPU, in the uncached run of one prompt and seed.

    Raises ProfileError, naming the step, where they are not finite.
    """
    net = _ValueRecorder(subject, site)
    with installed(subject.target, net):
        subject.target.generate([prompt], [seed])
    for step, value in enumerate(net.values):
        if not all_finite(value):
            raise ProfileError(
                f"prompt 1 ({arguments.shown(prompt)}): site {site!r} is NaN or infinite from step {step + 1} of "
                f"{len(net.values)} on; leave it out, or check the dtype"
            )
    return torch.stack(net.values)


class _ValueRecorder(Handler):
    """Runs the denoiser as it is and keeps the values of one site."""

    def __init__(self, subject: Subject, name: str) -> None:
        super().__init__(subject.module)
        (site,) = subject.sites.select(name)[:1]
        port = max(range(len(site.ports)), key=lambda index: subject.sites.costs[site.ports[index].out].bytes)
        self.subject, self.tables, self.values = subject, Tables(), []
        self.variant = variant(subject.captured, Row((Writes((site,)),)), "values", Observer())
        self.place = self.variant.outputs + self.variant.gives.index(Write(site.name, port))

    def call(self, *args: Any, **kwargs: Any) -> Any:
        captured = self.subject.captured
        call = bind(self.module, args, kwargs, self.subject.run.as_tensors)
        binding = Binding(self.tables, captured, call, step=len(self.values))
        outputs = self.variant.graph_module(*binding.of(self.variant.takes))
        self.values.append(outputs[self.place].detach().cpu())
        return pytree.tree_unflatten(outputs[: self.variant.outputs], captured.out_spec)
