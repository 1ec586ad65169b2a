"""House rules that a tool can check: packaging, size, names, lean imports, lint, and the order of passes."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dcc.errors import PassError
from dcc.passes import PASSES
from dcc.variants.observe import check_order

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
SHARED = {"__init__", "base", "graph"}  # of passes/: what passes share, tested through them

# Whole words, and whole words of CamelCase names: FluxPipeline and wan_block count, fluxes and want do not.
MODELS = (
    "allegro auraflow chroma cogvideo cogvideox cogview cosmos flux hidream hunyuan hunyuandit hunyuanimage "
    "hunyuanvideo kandinsky latte ltx ltxvideo lumina mochi omnigen pixart qwen qwenimage sana sd3 sdxl wan zimage"
).split()
ALONE = r"(?<![A-Za-z])(?:{0}|{1})(?![a-z])|(?<![A-Z]){2}(?![a-z])"
MODEL_NAME = re.compile("|".join(ALONE.format(name, name.upper(), name.capitalize()) for name in MODELS))


def sources(*folders):
    """Python files under the folders."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def relative(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def python(*arguments, cwd):
    """A fresh interpreter that no environment variable of ours reaches."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "DCC_"))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_every_folder_of_sources_is_a_package():
    """Ordinary discovery installs folders that have an __init__.py; passes and kernels stand in dcc/ by links."""
    folders = {path.parent for path in sources("dcc", "passes", "kernels")}
    assert relative(folder for folder in folders if not (folder / "__init__.py").exists()) == []
    links = {name: (ROOT / "dcc" / name).resolve() for name in ("passes", "kernels")}
    assert links == {name: ROOT / name for name in links}
    assert (ROOT / SETUPTOOLS["package-dir"][""] / "dcc").resolve() == ROOT / "dcc"


def test_passes_and_kernels_are_flat():
    nested = [path for folder in ("passes", "kernels") for path in sources(folder) if path.parent != ROOT / folder]
    assert relative(nested) == []


def test_no_file_is_over_500_lines():
    files = sources("dcc", "passes", "kernels", "tests", "benchmarks")
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    assert {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > 500} == {}
    assert len(lengths) > 30


def test_files_are_named_by_their_idea():
    files = sources("dcc", "passes", "kernels", "tests", "benchmarks")
    assert relative(path for path in files if path.stem in ("utils", "util", "common", "helpers", "misc")) == []


def model_names(text):
    """Every model name in `text`."""
    return MODEL_NAME.findall(text)


def test_no_source_knows_a_model():
    files = [path for path in sources("dcc", "passes", "kernels") if ROOT / "dcc" / "demo" not in path.parents]
    found = {
        f"{path.relative_to(ROOT)}:{number}": line.strip()
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if model_names(line)
    }
    assert found == {}


@pytest.mark.parametrize(
    "text",
    ["if name == 'flux':", "FluxTransformer2DModel", "wan_block", "a Wan model", "SD3", "LTXVideo", "sdxl-turbo"],
)
def test_model_names_are_recognised(text):
    assert model_names(text)


@pytest.mark.parametrize("text", ["we want fluxes", "wander", "chromatic", "a cosmology", "influx", "sanatorium"])
def test_other_words_are_not(text):
    assert not model_names(text)


def test_every_pass_and_kernel_has_its_test():
    missing = [
        f"tests/{folder}/test_{path.stem}.py"
        for folder in ("passes", "kernels")
        for path in sources(folder)
        if path.stem not in SHARED and not (ROOT / "tests" / folder / f"test_{path.stem}.py").exists()
    ]
    assert missing == []


def test_a_pass_is_named_as_its_file():
    assert [pass_.name for pass_ in PASSES] == [type(pass_).__module__.rpartition(".")[2] for pass_ in PASSES]
    assert len({pass_.name for pass_ in PASSES}) == len(PASSES)


def test_passes_import_no_pass():
    """Analyses may be imported; a file that defines a Pass may not, but by the list of passes."""
    rewrites = "|".join(pass_.name for pass_ in PASSES)
    imported = re.compile(rf"^(?:from|import) .*\b(?:{rewrites})\b", re.MULTILINE)
    files = [path for path in sources("passes") if path.stem != "__init__"]
    assert relative(path for path in files if imported.search(path.read_text())) == []


def test_passes_meet_their_declared_order():
    check_order(PASSES)
    names = {pass_.name for pass_ in PASSES}
    assert {other for pass_ in PASSES for other in pass_.after} <= names


def test_a_wrong_order_names_every_violation():
    with pytest.raises(PassError) as caught:
        check_order(PASSES[::-1])
    assert set(str(caught.value).split("; ")) == {
        f"{pass_.name} must come after {other}" for pass_ in PASSES for other in pass_.after
    }


LEAN = """
import torch
FACTS = lambda: (
    torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
    torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
    torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(), str(torch.get_default_device()),
    torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(), torch.get_rng_state().sum().item(),
)
before = FACTS()
import dcc
assert FACTS() == before, (before, FACTS())
assert not torch.cuda.is_initialized()
print(dcc.__version__)
"""


def test_import_changes_no_global_setting(tmp_path):
    result = python("-P", "-c", LEAN, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == PROJECT["project"]["version"]


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_bare_imports_from_the_root_are_refused(name):
    result = python("-c", f"import {name}", cwd=ROOT)
    assert result.returncode == 1
    assert f"ImportError: import dcc.{name}; a bare `{name}` is" in result.stderr


def test_the_root_is_not_on_the_path():
    assert ROOT not in [Path(entry or os.curdir).resolve() for entry in sys.path]


@pytest.mark.skipif(shutil.which("ruff") is None, reason="needs ruff")
def test_ruff():
    result = subprocess.run(
        ["ruff", "check", "--output-format=concise", "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
