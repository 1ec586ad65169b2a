"""Every use of parts of torch and diffusers that these do not promise to keep; no other file of dcc touches them.

Each is used here only, with the reason why it is needed, and has a canary in tests/test_torch_internals.py that fails
when a new version of torch or diffusers changes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload  # the class of an operator in a graph; there is no public name for it
from torch._subclasses import FakeTensorMode  # shapes of every value of a graph, computed without memory
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.passes.tools_common import legalize_graph  # sorts a graph so that no node is used before it is made
from torch.utils import _pytree as pytree  # torch.export flattens a call with it, so dcc has to

__all__ = [
    "ASSERTIONS",
    "COMPILED_CALL",
    "CPU_ATTENTION",
    "FakeTensorMode",
    "OpOverload",
    "compile_with_inductor",
    "expression",
    "fake_mode_with_sizes",
    "fixed_size",
    "hint",
    "hook_names",
    "invoke_subgraph",
    "is_torch_compiled",
    "lazy_graph_module",
    "legalize_graph",
    "load_inductor",
    "module_stack",
    "plain_call",
    "probe_cpu",
    "progress_bar_settings",
    "pytree",
    "schema",
    "set_module_stack",
    "sizes_from_hints",
    "slots",
    "spell",
    "storage_id",
    "symbols_of",
    "to_copy",
    "version",
]

ASSERTIONS = frozenset(  # what torch.export leaves in a graph to check a value, a dtype or a size
    {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten._assert_async.msg,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
)
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch's FLOP counter knows the GPU's only
COMPILED_CALL = "_compiled_call_impl"  # what nn.Module calls in place of itself; nn.Module.compile sets it
to_copy = torch.ops.aten._to_copy.default  # a cast that never aliases; one of the core ATen operators of torch.export
invoke_subgraph = torch.ops.higher_order.invoke_subgraph  # the one call of a shared body that Inductor compiles once


def schema(op: OpOverload) -> Any:
    """The operator's schema: its arguments, its returns, and which of them alias or are written to."""
    return op._schema


def module_stack(node: Node) -> dict[str, tuple[str, Any]]:
    """Paths and classes of the modules around a node, outermost first; torch.export keeps them nowhere else."""
    return node.meta.get("nn_module_stack") or {}


def set_module_stack(node: Node, stack: Mapping[str, tuple[str, Any]]) -> None:
    """Says which modules are around a node, in the form that `module_stack` returns."""
    node.meta["nn_module_stack"] = dict(stack)


def lazy_graph_module(root: nn.Module, graph: Graph) -> GraphModule:
    """A graph module whose Python code is written when it is first run, because many graphs are only lowered."""
    return _LazyGraphModule(root, graph)


def fake_mode_with_sizes() -> FakeTensorMode:
    """A fake tensor mode with a shape environment; Inductor keeps nothing on disk for a graph without one."""
    return FakeTensorMode(shape_env=ShapeEnv())


def sizes_from_hints(hints: Mapping[str, int]) -> tuple[FakeTensorMode, dict[str, torch.SymInt]]:
    """Symbolic sizes, by name, of these values, and a mode whose fake tensors may have them.

    torch makes symbols only while it traces; a graph that is read from a file needs them without a trace.
    """
    from torch._dynamo.source import ConstantSource  # a second that whoever reads no graph need not wait

    environment, sizes = ShapeEnv(), {}
    for name, value in hints.items():
        source = ConstantSource(f"dcc_{name}")
        symbol = environment.create_symbol(value, source, dynamic_dim=DimDynamic.DYNAMIC)
        sizes[name] = environment.create_symintnode(symbol, hint=value, source=source)
    return FakeTensorMode(shape_env=environment), sizes


def hint(size: Any) -> int:
    """The value that a size had at capture; reading it adds no guard, which `int(size)` would."""
    return size if isinstance(size, int) else int(size.node.hint)


def fixed_size(size: int | torch.SymInt) -> int | None:
    """The value of a size that is the same in every call, None for one that may vary."""
    fixed = size if isinstance(size, int) else size.node.maybe_as_int()
    return None if fixed is None else int(fixed)


def expression(size: torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
    """The sympy expression of a symbolic size."""
    return size.node.expr


def symbols_of(size: int | torch.SymInt) -> set[str]:
    """Names of the symbols that a size is made of; none for a fixed one."""
    return set() if isinstance(size, int) else {str(symbol) for symbol in expression(size).free_symbols}


def spell(expression: Any) -> str:
    """A sympy expression of torch's own functions as Python arithmetic; sympy's printer does not know those."""
    from torch.utils._sympy.printers import PythonPrinter

    return PythonPrinter().doprint(expression)


def storage_id(tensor: Tensor) -> int:
    """What tells storages apart, of fake tensors too, which have no address."""
    return tensor.untyped_storage()._cdata


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written to in place; None for an inference tensor, which does not count."""
    return None if tensor.is_inference() else tensor._version


def slots(module: nn.Module) -> tuple[dict[str, nn.Parameter | None], dict[str, Tensor | None]]:
    """A module's own dictionaries of parameters and of buffers, in which a swapped weight is seen at once."""
    return module._parameters, module._buffers


def plain_call(module: nn.Module) -> Callable[..., Any]:
    """What calling the module does, hooks and all, where nothing is set in the place of it."""
    return module._call_impl


def is_torch_compiled(module: nn.Module) -> bool:
    """Whether the module is what `torch.compile(module)` returned, which keeps the module in `_orig_mod`."""
    return isinstance(getattr(module, "_orig_mod", None), nn.Module)


def load_inductor() -> None:
    """Imports what Inductor needs before it makes code for a CPU: two seconds, which an eager user need not wait."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of what they import
        import torch._inductor.codecache
        import torch._inductor.cpu_vec_isa
        import torch.utils.cpp_extension  # noqa: F401 - a thread would import it, beside imports of the main thread


def probe_cpu() -> None:
    """Finds out what the processor can do, which Inductor does once per process before it makes code for a CPU."""
    from torch._inductor import cpu_vec_isa

    cpu_vec_isa.valid_vec_isa_list()


def compile_with_inductor(graph_module: GraphModule, inputs: Sequence[Tensor], mode: str) -> Callable[..., Any]:
    """Lowers a graph for inputs like these with the settings of a mode of torch.compile, except CUDA graphs.

    torch.compile would run Dynamo over the graph again, guard it, and cut it at what it does not know.
    """
    import torch._inductor

    options = torch._inductor.list_mode_options(mode) | {"triton.cudagraphs": False}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations; under -W error they would stop the lowering
        compiled: Any = torch._inductor.compile(graph_module, list(inputs), options)
    return compiled


def hook_names(module: nn.Module) -> list[str] | None:
    """Names of the hooks that diffusers has set on a module; None where diffusers never hooked it.

    diffusers leaves an empty registry, and a replaced `forward`, where hooks were removed.
    """
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else list(getattr(registry, "hooks", {}))


def progress_bar_settings(pipe: Any) -> dict[str, Any]:
    """The pipeline's progress bar settings, which it can be told but not asked."""
    return dict(getattr(pipe, "_progress_bar_config", {}))
