"""dcc: a compiler that inserts feature caching into the sampling loop of a diffusion model."""

import importlib.util
import sys
from pathlib import Path

_bare = importlib.util.find_spec("kernels")
if _bare is not None and _bare.origin == str(Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"):
    # python was started at the root of dcc's sources: without this, transformers would take our folder for the
    # package of Hugging Face that is called kernels, and fail
    sys.modules["kernels"] = None  # type: ignore[assignment]

from dcc import demo, errors  # noqa: E402
from dcc.compiler import compile, compiled, disabled, plan, restore, sites, summary  # noqa: E402
from dcc.measure.calibrate import calibrate  # noqa: E402
from dcc.measure.profile import Profile  # noqa: E402
from dcc.plans.plan import Plan  # noqa: E402
from dcc.report.evaluate import evaluate  # noqa: E402 - the function, in place of its module
from dcc.serve.denoiser import CompiledDenoiser  # noqa: E402

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
__version__ = "0.6.0"
