"""Writes the two pipelines (averaged weights, half precision) and the prompts into dcc/demo.

Takes OUT/vae and OUT/<name>.pt; whatever is missing stays random. Each folder is replaced at once.
"""

import argparse
import json
import shutil
from pathlib import Path

import card
import models
import scenes
import torch
from diffusers import AutoencoderKL

DEMO = Path(__file__).resolve().parents[2] / "dcc" / "demo"
CALIBRATION, TEST = 32, 64


def prompts():
    """Writes the calibration prompts (trained scenes) and the test prompts (held out)."""
    for name, chosen in (
        ("calib", scenes.trained_scenes(CALIBRATION)),
        ("test", scenes.held_out_scenes(TEST)),
    ):
        text = json.dumps([scene.caption for scene in chosen], indent=1)
        (DEMO / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def export(name, out):
    """Saves the pipeline `name` with the weights found under `out`."""
    folder = out / "vae"
    parts = models.parts(name, AutoencoderKL.from_pretrained(folder) if folder.exists() else None)
    checkpoint, state = out / f"{name}.pt", {}
    if checkpoint.exists():
        state = torch.load(checkpoint)
        weights = [w for key in models.TRAINED[name] for w in parts[key].parameters()]
        with torch.no_grad():
            for weight, mean in zip(weights, state["mean"], strict=True):
                weight.copy_(mean)
    pipe = models.pipeline(name, parts).to(dtype=torch.float16)
    target = DEMO / name
    fresh, old = DEMO / f".{name}.new", DEMO / f".{name}.old"
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipe.save_pretrained(fresh, safe_serialization=True)
    size = sum(file.stat().st_size for file in fresh.rglob("*.safetensors"))
    for file in fresh.glob("*/config.json"):  # where a part was once loaded from is nobody's business
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (fresh / "README.md").write_text(card.write(name, parts, state, size), encoding="utf-8")
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    print(f"{name}: step {state.get('step', 0)}, {size / 1e6:.1f} MB in {target}")


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path("runs/zoo"))
    arguments.add_argument("names", nargs="*", default=["mmdit", "unet"])
    options = arguments.parse_args()
    torch.set_num_threads(1)
    DEMO.mkdir(parents=True, exist_ok=True)
    prompts()
    for name in options.names:
        export(name, options.out)


if __name__ == "__main__":
    main()
