"""Compiled denoisers that are called themselves, so that a test may hold several of one module."""

from __future__ import annotations

from typing import Any

from torch import nn

import dcc


def apart(module: nn.Module, prompts: Any, **options: Any) -> dcc.CompiledDenoiser:
    """`dcc.compile`, then taken off the module, which is as it was."""
    net = dcc.compiled(dcc.compile(module, prompts, **options))
    dcc.restore(module)
    return net
