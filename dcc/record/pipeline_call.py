"""The arguments of a pipeline's call that callers give to dcc: unknown and malformed ones are refused before any work.

Runs are compared with each other, so dcc gives their noise, their prompts and the form of their results itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from dcc import arguments
from dcc.errors import PipelineError

OUTPUTS = ("pil", "np", "pt", "latent")
LATENT = "latent"
NOISE = "dcc draws the noise of every run from seed=, so that runs can be compared"
ONE = "dcc samples every prompt once; what it compiles takes any number when it is called"
PROMPTS = "dcc passes the prompts, which it is given as a list"
REFUSED = {
    "generator": NOISE,
    "latents": NOISE,
    "num_images_per_prompt": ONE,
    "num_videos_per_prompt": ONE,
    "num_waveforms_per_prompt": ONE,
    "prompt": PROMPTS,
    "prompt_embeds": PROMPTS,
}
AT_LEAST_ONE = ("num_inference_steps", "height", "width", "num_frames", "max_sequence_length")


def parameters_of(pipe: Any) -> dict[str, inspect.Parameter]:
    """The named arguments of a pipeline's call."""
    found = inspect.signature(pipe.__call__).parameters
    return {name: p for name, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Raises PipelineError, naming the argument and good values, for any that the pipeline lacks or cannot take."""
    known = parameters_of(pipe)
    unknown = [name for name in call if name not in known]
    if unknown:
        raise PipelineError(
            f"unknown keyword {arguments.listed(unknown, list(known))}: no argument of {type(pipe).__name__}'s call, "
            f"which takes: {', '.join(known)}"
        )
    for name, value in call.items():
        default = known[name].default
        if value is None or (value is default and not isinstance(value, bool)):
            continue
        reason = REFUSED.get(name) or (PROMPTS if name == next(iter(known)) else None)
        if reason is not None and not (reason is ONE and type(value) is int and value == 1):
            raise PipelineError(f"{name}={arguments.shown(value)}: {reason}; leave it out")
        if name == "output_type":
            arguments.chosen(name, value, OUTPUTS, PipelineError)
        elif name == "callback_on_step_end":
            if not callable(value):
                raise PipelineError(f"{name}={arguments.shown(value)} must be a function")
        else:
            _check_kind(name, value, _kinds(known[name].annotation))


def _kinds(annotation: Any) -> set[str]:
    """The types that an annotation names, in whichever spelling, but for None."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return set(re.findall(r"\w+", text)) - {"None", "NoneType", "Optional", "Union", "typing", "Any", "_empty"}


def _check_kind(name: str, value: Any, kinds: set[str]) -> None:
    """Refuses what cannot be one of the kinds: words and booleans for numbers, numbers for words, and the like."""
    word = isinstance(value, (str, bytes))
    if kinds == {"bool"}:
        arguments.flag(name, value, PipelineError)
    elif kinds == {"int"} and (word or isinstance(value, (bool, int, float))):
        arguments.whole(name, value, int(name in AT_LEAST_ONE), error=PipelineError)
    elif kinds and kinds <= {"int", "float"} and (word or isinstance(value, (bool, int, float))):
        arguments.number(name, value, PipelineError)
    elif kinds and kinds <= {"str", "list", "List", "dict", "Dict"} and isinstance(value, (bool, int, float)):
        good = {"str": "a string", "list": "a list", "List": "a list", "dict": "a dict", "Dict": "a dict"}
        wanted = " or ".join(sorted({good[kind] for kind in kinds}, reverse=True))
        raise PipelineError(f"{name}={arguments.shown(value)} must be {wanted}")
