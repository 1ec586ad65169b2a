"""Every use of parts of torch and diffusers that these do not promise to keep; no other file of dcc touches them.

Each is used here only, with the reason why it is needed, and has a canary in tests/test_torch_internals.py that fails
when a new version of torch or diffusers changes it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch._ops import OpOverload  # the class of an operator in a graph; there is no public name for it
from torch._subclasses import FakeTensorMode  # shapes of every value of a graph, computed without memory
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.passes.tools_common import legalize_graph  # sorts a graph so that no node is used before it is made
from torch.utils import _pytree as pytree  # torch.export flattens a call with it, so dcc has to
from torch.utils._sympy import functions as size_functions  # what the sizes of torch's graphs are made of

__all__ = [
    "ASSERTIONS",
    "COMPILED_CALL",
    "CPU_ATTENTION",
    "SIZE_EXPRESSIONS",
    "FakeTensorMode",
    "OpOverload",
    "SizeEnvironment",
    "attention_backend",
    "children",
    "compile_with_inductor",
    "expression",
    "fake_mode_with_sizes",
    "fixed_size",
    "global_hooks",
    "hint",
    "hook_names",
    "invoke_subgraph",
    "is_torch_compiled",
    "lazy_graph_module",
    "legalize_graph",
    "load_inductor",
    "module_stack",
    "number_at_capture",
    "plain_call",
    "probe_cpu",
    "progress_bar_settings",
    "pytree",
    "schema",
    "set_module_stack",
    "slots",
    "storage_id",
    "symbols_of",
    "to_copy",
    "tree_from_json",
    "tree_to_json",
    "version",
    "without_guards",
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
REGISTERED = ("_parameters", "_buffers", "_modules")  # a module's own dictionaries of what is registered
COMPILED_CALL = "_compiled_call_impl"  # what nn.Module calls in place of itself; nn.Module.compile sets it
SIZE_EXPRESSIONS: dict[str, Any] = {  # what the sizes of a graph are made of, by the name of its class
    function.__name__: function
    for function in (
        *(sympy.Add, sympy.Mul, sympy.Pow, sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge),
        *(sympy.And, sympy.Or, sympy.Not, size_functions.Max, size_functions.Min),
        *(size_functions.PowByNatural, size_functions.FloatPow, size_functions.FloorDiv, size_functions.CleanDiv),
        *(size_functions.CeilDiv, size_functions.IntTrueDiv, size_functions.FloatTrueDiv, size_functions.Mod),
        *(size_functions.PythonMod, size_functions.ModularIndexing, size_functions.ToFloat),
        *(size_functions.CeilToInt, size_functions.FloorToInt, size_functions.TruncToInt, size_functions.RoundToInt),
    )
}
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


class SizeEnvironment:
    """Symbolic sizes of given values without a trace, which a graph that is read from a file needs.

    torch makes symbols only while it traces. `fake_mode` makes tensors that may have these sizes.
    """

    def __init__(self, hints: Mapping[str, int]) -> None:
        from torch._dynamo.source import ConstantSource  # a second that whoever reads no graph need not wait

        self._shapes, self.symbols = ShapeEnv(), {}
        for name, value in hints.items():
            source = ConstantSource(f"dcc_{name}")
            self.symbols[name] = self._shapes.create_symbol(value, source, dynamic_dim=DimDynamic.DYNAMIC)
        self.fake_mode = FakeTensorMode(shape_env=self._shapes)

    def atom(self, value: str | bool | int | float) -> Any:
        """A symbol by its name, or a number, as a part of an expression."""
        return self.symbols[value] if isinstance(value, str) else sympy.sympify(value)

    def size(self, kind: str, formula: Any, value: Any) -> Any:
        """The size of an expression, an "int", a "float" or a "bool", which has this value at capture."""
        if formula.is_number or (formula.is_Boolean and not formula.args):
            return {"int": int, "float": float, "bool": bool}[kind](formula)
        node = SymNode(formula, self._shapes, {"int": int, "float": float, "bool": bool}[kind], value)
        return {"int": torch.SymInt, "float": torch.SymFloat, "bool": torch.SymBool}[kind](node)


def without_guards() -> AbstractContextManager[None]:
    """While it lasts, operators on fake tensors leave symbolic sizes as they are, also where they compare them.

    A graph that is rewritten shares its symbols with the captured one, which serves other calls too.
    """
    return ShapeEnv().suppress_guards()


def hint(size: Any) -> int:
    """The value that a size had at capture; reading it adds no guard, which `int(size)` would."""
    return size if isinstance(size, int) else int(size.node.hint)


def number_at_capture(size: Any) -> int | float | bool | None:
    """The value that a number had at capture; None for what is none, or was known only as the graph ran."""
    if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        return size.node.hint
    return size if isinstance(size, int | float) else None


def fixed_size(size: int | torch.SymInt) -> int | None:
    """The value of a size that is the same in every call, None for one that may vary."""
    fixed = size if isinstance(size, int) else size.node.maybe_as_int()
    return None if fixed is None else int(fixed)


def expression(size: torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
    """The sympy expression of a symbolic size."""
    return size.node.expr


def symbols_of(size: int | torch.SymInt | torch.SymFloat | torch.SymBool) -> set[str]:
    """Names of the symbols that a size is made of; none for a fixed one."""
    return set() if isinstance(size, int) else {str(symbol) for symbol in expression(size).free_symbols}


def tree_to_json(spec: pytree.TreeSpec) -> Any:
    """A structure of outputs as JSON: the index of each output, in tuples, lists, dicts and registered classes.

    torch's own `treespec_dumps` writes more than that, and `treespec_loads` imports what a file names. Raises
    TypeError for a structure of other parts.
    """
    return _described(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))


def tree_from_json(data: Any, leaves: int) -> pytree.TreeSpec:
    """The structure of `tree_to_json`. Raises TypeError unless it holds each of `leaves` outputs once, in order."""
    found, spec = pytree.tree_flatten(_built(data))
    if found != list(range(leaves)):
        raise TypeError(f"the structure of outputs holds {found!r:.80}, not 0 to {leaves - 1}")
    return spec


def _described(value: Any) -> Any:
    if type(value) is int:
        return value
    if type(value) in (tuple, list):
        return {type(value).__name__: [_described(item) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _described(item) for key, item in value.items()}}
    known = pytree.SUPPORTED_SERIALIZED_TYPES.get(type(value))
    if known is not None and pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(known.serialized_type_name) is type(value):
        children, names = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
        if isinstance(names, list) and all(type(name) is str for name in names):
            return {"class": [known.serialized_type_name, dict(zip(names, map(_described, children), strict=True))]}
    raise TypeError(f"outputs in a {type(value).__name__} have no spelling in a file")


def _built(data: Any) -> Any:
    if type(data) is int:
        return data
    ((kind, content),) = data.items() if isinstance(data, dict) and len(data) == 1 else ((None, None),)
    if kind in ("tuple", "list") and isinstance(content, list):
        items = [_built(item) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict" and isinstance(content, dict):
        return {key: _built(item) for key, item in content.items()}
    if kind == "class" and isinstance(content, list) and len(content) == 2 and isinstance(content[1], dict):
        name, parts = content
        known = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name) if isinstance(name, str) else None
        if isinstance(known, type) and issubclass(known, dict):  # the output classes of diffusers and transformers
            return pytree.SUPPORTED_NODES[known].unflatten_fn(map(_built, parts.values()), list(parts))
    raise TypeError(f"{data!r:.80} is no structure of outputs")


def storage_id(tensor: Tensor) -> int:
    """What tells storages apart, of fake tensors too, which have no address."""
    return tensor.untyped_storage()._cdata


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written to in place; None for an inference tensor, which does not count."""
    return None if tensor.is_inference() else tensor._version


def slots(module: nn.Module) -> tuple[dict[str, nn.Parameter | None], dict[str, Tensor | None]]:
    """A module's own dictionaries of parameters and of buffers, in which a swapped weight is seen at once."""
    return module._parameters, module._buffers


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own dictionary of the modules in it."""
    return module._modules


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


def attention_backend() -> Any:
    """The attention backend that diffusers uses where no processor names one; None where diffusers has none."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    return getattr(registry, "_active_backend", None)


def global_hooks() -> bool:
    """Whether there are hooks that torch runs around every call of every module."""
    from torch.nn.modules import module

    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)
