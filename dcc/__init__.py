"""dcc: a compiler that inserts feature caching into the sampling loop of a diffusion model."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcc import demo, errors
    from dcc.compiler import compile, compiled, disabled, plan, restore, sites, summary
    from dcc.measure.calibrate import calibrate
    from dcc.measure.profile import Profile
    from dcc.plans.plan import Plan
    from dcc.report.evaluate import evaluate
    from dcc.serve.denoiser import CompiledDenoiser

__version__ = "0.6.0"
__all__ = [
    "CompiledDenoiser",
    "Plan",
    "Profile",
    "calibrate",
    "compile",
    "compiled",
    "demo",
    "disabled",
    "errors",
    "evaluate",
    "plan",
    "restore",
    "sites",
    "summary",
]
_HOMES = {  # where each name is defined; imported when first asked for, so that `import dcc` takes no time
    "CompiledDenoiser": "dcc.serve.denoiser",
    "Plan": "dcc.plans.plan",
    "Profile": "dcc.measure.profile",
    "calibrate": "dcc.measure.calibrate",
    "evaluate": "dcc.report.evaluate",
    **dict.fromkeys(("compile", "compiled", "disabled", "plan", "restore", "sites", "summary"), "dcc.compiler"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in __all__ or (not name.startswith("_") and importlib.util.find_spec(f"dcc.{name}") is not None):
        value = importlib.import_module(f"dcc.{name}")
    else:
        raise AttributeError(f"module 'dcc' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _hide_our_kernels() -> None:
    """Keeps transformers from taking our folder kernels/ for Hugging Face's package of that name.

    It would do so, and fail to import, where python was started at the root of dcc's sources.
    """
    bare = importlib.util.find_spec("kernels")
    if bare is not None and bare.origin == str(Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"):
        sys.modules["kernels"] = None  # type: ignore[assignment]


_hide_our_kernels()
