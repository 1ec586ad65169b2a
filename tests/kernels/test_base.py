"""What kernels share; every kernel compiled for GPUs that need not be there; and the ops without Triton."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcc.errors import KernelError
from dcc.kernels import base, combine, distance, gather_tokens, merge_tokens, sketch

AHEAD_OF_TIME = Path(__file__).parent / "ahead_of_time.py"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What every kernel came to: its size, and the widths in bytes at which it reads."""
    pytest.importorskip("triton.backends.nvidia")
    environment = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, str(AHEAD_OF_TIME)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_kernel_compiles_for_two_architectures(compiled):
    for architecture in (80, 90):
        sizes = {name: facts["bytes"] for name, facts in compiled.items() if name.endswith(f"sm_{architecture}")}
        assert len(sizes) == 12 and min(sizes.values()) > 1000


@pytest.mark.parametrize("name", ["combine", "distance", "gather_tokens", "merge_tokens"])
def test_values_are_read_16_bytes_at_a_time(compiled, name):
    """Sketches cannot be: their rows have a prime number of columns. The second part of `distance` reads sums."""
    widths = [
        facts["reads"] for kernel, facts in compiled.items() if kernel.startswith(name) and "finish" not in kernel
    ]
    assert widths and all(16 in reads for reads in widths)


def test_every_kernel_file_is_compiled(compiled):
    files = {path.stem for path in Path(base.__file__).parent.glob("*.py") if "@jit(" in path.read_text()}
    assert files == {name.replace(",", "").split()[0] for name in compiled}


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from dcc.errors import KernelError
from dcc.kernels import base, combine, distance, gather_tokens, merge_tokens, sketch
assert base.triton is None
a, c, index = torch.ones(1, 4, 3), torch.full((1, 1, 1), 2.0), torch.tensor([[1]])
assert torch.equal(combine.op(c, 0, [a], True), 2 * a)
assert distance.op(a, a, "rel_l1", 1).tolist() == [0]
assert torch.equal(merge_tokens.op(c, 0, [a], True, index, gather_tokens.op(a, index)).sum(), torch.tensor(21.0))
assert sketch.op(a[None], a).shape == (1, 1, 12)
try:
    combine.launch(c, 0, [a], True)
except KernelError as error:
    print(error)
"""


def test_without_triton_ops_run_their_references(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "dcc.kernels.combine: Triton is not installed; call the op, which then runs its reference\n"
    )


def test_a_compiler_sees_each_op_as_one_call():
    class Layer(torch.nn.Module):
        def forward(self, x, table, index):
            fresh = gather_tokens.op(x, index) * 2
            merged = merge_tokens.op(table, 0, [x], True, index, fresh)
            summed = combine.op(table, 1, [merged], True, None, None, x)
            return summed, distance.op(summed, x, "l1", x.shape[0]), sketch.op(x[None], x)

    arguments = (torch.randn(2, 7, 3), torch.randn(2, 2, 1), torch.tensor([[1, 4], [0, 6]]))
    tokens = torch.export.Dim("tokens", min=2)
    exported = torch.export.export(Layer(), arguments, dynamic_shapes=({1: tokens}, None, None))
    calls = [str(node.target) for node in exported.graph.nodes if "dcc" in str(node.target)]
    names = ["gather_tokens", "merge_tokens", "combine", "distance", "sketch"]
    assert calls == [f"dcc.{name}.default" for name in names]
    wider = (torch.randn(2, 12, 3), *arguments[1:])
    for ours, expected in zip(exported.module()(*wider), Layer()(*wider), strict=True):
        assert torch.equal(ours, expected)


def test_ops_run_their_references_on_a_cpu():
    assert not base.runs_on(torch.ones(1))


@pytest.mark.parametrize(("number", "expected"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (129, 128)])
def test_power_of_2(number, expected):
    assert base.power_of_2(number, 128) == expected


def test_memory_order():
    images = torch.randn(2, 3, 4, 5)
    last = images.to(memory_format=torch.channels_last)
    assert base.memory_format(images) is torch.contiguous_format
    assert base.memory_format(last) is torch.channels_last
    assert base.memory_format(images.transpose(2, 3)) is torch.contiguous_format
    assert base.memory_format(torch.randn(2, 3).t()) is torch.contiguous_format
    first, second = base.in_order([last, images])
    assert torch.equal(first, second) and first.shape == (2, 4, 5, 3)
    assert first.data_ptr() == last.data_ptr() and second.is_contiguous()
    with pytest.raises(KernelError, match=r"one shape; got \[2, 3, 4, 5\], \[2, 3, 4\]"):
        base.in_order([images, images[..., 0]])
