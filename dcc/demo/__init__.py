"""Two small text-to-image pipelines, trained from scratch on drawn scenes, that come with the package.

pipe = dcc.demo.load("mmdit")
image = pipe(dcc.demo.prompts("test")[0], **dcc.demo.settings("mmdit")).images[0]
"""

import json
from pathlib import Path

from dcc import arguments
from dcc.errors import DemoError

_HERE = Path(__file__).parent
# How each pipeline was trained to be called; everything else is the pipeline's own default.
_SETTINGS = {
    "mmdit": {"height": 64, "width": 64, "num_inference_steps": 28, "max_sequence_length": 16},
    "unet": {"height": 64, "width": 64, "num_inference_steps": 50, "guidance_scale": 3.0},
}


def names() -> list[str]:
    """Names of the embedded pipelines."""
    return list(_SETTINGS)


def path(name: str) -> str:
    """The folder of a pipeline, in the layout of `DiffusionPipeline.save_pretrained`."""
    arguments.chosen("demo pipeline", name, names(), DemoError)
    folder = _HERE / name
    if not (folder / "model_index.json").is_file():
        raise DemoError(f"The demo pipeline {name!r} is not part of this installation ({folder} is missing).")
    return str(folder)


def settings(name: str) -> dict:
    """The keyword arguments of a call: 64 x 64 pixels, the steps, the text length or the guidance."""
    path(name)
    return dict(_SETTINGS[name])


def load(name: str, torch_dtype=None, **kwargs):
    """The pipeline (float32 unless told otherwise) without progress bar; kwargs go to `from_pretrained`."""
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if torch_dtype is not None and not (isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point):
        raise DemoError(f"torch_dtype={arguments.shown(torch_dtype)} must be a dtype, e.g. torch.float16")
    pipe = DiffusionPipeline.from_pretrained(path(name), **kwargs)
    for part in pipe.components.values():
        # Not an argument of from_pretrained: its name depends on the version of diffusers.
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, torch_dtype or torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(split: str = "calib") -> list[str]:
    """32 captions of the kind trained on ("calib") or 64 of combinations never trained on ("test")."""
    arguments.chosen("prompts", split, ("calib", "test"), DemoError)
    return json.loads((_HERE / f"{split}.json").read_text(encoding="utf-8"))
