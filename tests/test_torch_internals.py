"""A canary for each private use of torch and diffusers: what dcc relies on, checked on the torch that is installed."""

from __future__ import annotations

import copy
import json
import math
import operator
import pickle
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn
from torch.fx import Graph, GraphModule
from torch.utils.flop_counter import FlopCounterMode

from dcc import torch_internals as internals

aten = torch.ops.aten


def exported(module, *examples, sizes=None):
    return torch.export.export(module, examples, dynamic_shapes=sizes, strict=False)


def test_every_name_has_its_canary():
    """A private use without a test here is a test failure."""
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in internals.__all__ if f"internals.{name}" not in source] == []


def test_operators_of_an_exported_graph_have_the_class_and_a_schema():
    program = exported(nn.Linear(2, 3), torch.ones(1, 2))
    (call,) = [node for node in program.graph.nodes if node.op == "call_function"]
    assert isinstance(call.target, internals.OpOverload)
    schema = internals.schema(call.target)
    assert [argument.name for argument in schema.arguments] == ["input", "weight", "bias"]
    assert not schema.is_mutable and internals.schema(aten.add_.Tensor).is_mutable
    assert [value.alias_info is not None for value in internals.schema(aten.view.default).returns] == [True]
    assert internals.schema(aten._assert_async.msg).returns == []


def test_export_leaves_assertions_that_we_know():
    class Casts(nn.Module):
        def forward(self, x):
            return x.to(torch.float64) + 1

    program = exported(Casts(), torch.ones(2, 2))
    checks = [node.target for node in program.graph.nodes if "assert" in str(node.target)]
    assert checks and set(checks) <= internals.ASSERTIONS


def test_a_node_says_which_modules_stand_around_it():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))])

        def forward(self, x):
            return self.blocks[1](self.blocks[0](x))

    program = exported(Blocks(), torch.ones(1, 2))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    paths = [[path for path, _ in internals.module_stack(node).values()] for node in calls]
    assert paths == [["", "blocks.0"], ["", "blocks.1", "blocks.1.0"]]
    node = Graph().placeholder("x")
    assert internals.module_stack(node) == {}
    internals.set_module_stack(node, {"a": ("a", None)})
    assert internals.module_stack(node) == {"a": ("a", None)}


def test_pytree_flattens_a_call_as_export_does():
    class Takes(nn.Module):
        def forward(self, a, b):
            return {"sum": a["x"] + b[0], "rest": b[1] + 1}

    a, b = {"x": torch.ones(2)}, [torch.ones(2), torch.zeros(3)]
    program = exported(Takes(), a, b)
    leaves, spec = internals.pytree.tree_flatten(((a, b), {}))
    assert program.call_spec.in_spec == spec and len(leaves) == 3
    back = internals.pytree.tree_unflatten(list(program.module()(a, b).values()), program.call_spec.out_spec)
    assert list(back) == ["sum", "rest"]
    assert [path[0].idx for path, _ in internals.pytree.tree_flatten_with_path([1, 2])[0]] == [0, 1]


def test_sizes_of_a_capture_say_their_hint_and_their_symbols():
    any_size = torch.export.Dim.AUTO

    class Doubles(nn.Module):
        def forward(self, x):
            return torch.cat([x, x]).relu()

    program = exported(Doubles(), torch.ones(3, 4), sizes={"x": {0: any_size, 1: any_size}})
    rows, columns = next(n for n in program.graph.nodes if "cat" in n.name).meta["val"].shape
    assert (internals.hint(rows), internals.hint(columns), internals.hint(5)) == (6, 4, 5)
    assert len(internals.symbols_of(rows)) == 1 and internals.symbols_of(4) == set()
    assert internals.symbols_of(rows).isdisjoint(internals.symbols_of(columns))
    assert internals.fixed_size(rows) is None and internals.fixed_size(7) == 7
    assert [internals.number_at_capture(v) for v in (rows, columns, 5, 0.5, True, "5")] == [6, 4, 5, 0.5, True, None]
    (symbol,) = internals.symbols_of(rows)
    formula = internals.expression(rows)
    assert formula.func is internals.SIZE_EXPRESSIONS["Mul"] and {int(formula.args[0]), str(formula.args[1])} == {
        2,
        symbol,
    }


def test_sizes_are_made_without_a_trace():
    environment = internals.SizeEnvironment({"s0": 3, "s1": 5})
    rows, two = environment.atom("s0"), environment.atom(2)
    twice = internals.SIZE_EXPRESSIONS["Mul"](two, environment.atom("s1"))
    sizes = environment.size("int", rows, 3), environment.size("int", twice, 10)
    with environment.fake_mode:
        value = torch.empty(sizes).transpose(0, 1).contiguous()
    assert [internals.hint(size) for size in value.shape] == [10, 3]
    assert internals.symbols_of(value.shape[0]).isdisjoint(internals.symbols_of(value.shape[1]))
    assert environment.size("int", two, 2) == 2 and environment.size("bool", environment.atom(True), True) is True
    larger = environment.size("bool", internals.SIZE_EXPRESSIONS["StrictLessThan"](rows, twice), True)
    half = environment.size("float", internals.SIZE_EXPRESSIONS["IntTrueDiv"](rows, two), 1.5)
    assert (
        isinstance(larger, torch.SymBool)
        and isinstance(half, torch.SymFloat)
        and internals.number_at_capture(half) == 1.5
    )


def test_every_arithmetic_on_sizes_makes_an_expression_that_we_know():
    def values(a, b, c):
        return (
            a + b, a * b, a // b, a % b, -a // b, a**3, a / b, torch.sym_max(a, b), torch.sym_min(a, b),
            math.ceil(c / 2), math.floor(c * 0.5), torch.sym_int(c / 3), round(c / 2), torch.sym_float(a) * 1.5,
            a == b, a != b, a < b, a <= b, a > b, a >= b, torch.sym_not(a < b), (a < b) & (b < c), (a < b) | (b < c),
            torch.sym_float(a) ** 0.5,
        )  # fmt: skip

    environment = internals.SizeEnvironment({"s0": 12, "s1": 5, "s2": 7})
    sizes = [environment.size("int", environment.atom(f"s{i}"), v) for i, v in enumerate((12, 5, 7))]
    found, expected = values(*sizes), values(12, 5, 7)
    used = set()
    for size, number in zip(found, expected, strict=True):
        assert internals.number_at_capture(size) == number
        parts = [internals.expression(size)]
        while parts:
            used.add(parts[-1].func)
            parts += parts.pop().args
    atoms = {part for part in used if not issubclass(part, tuple(internals.SIZE_EXPRESSIONS.values()))}
    assert all(not atom.args for size in found for atom in internals.expression(size).atoms())
    assert {atom.__name__ for atom in atoms} <= {"Symbol", "Integer", "Float", "NegativeOne", "One", "Zero", "Half"}


def test_a_structure_of_outputs_is_written_as_data():
    outputs = UNet2DConditionOutput(sample=[torch.ones(1), (torch.ones(2), {"b": torch.ones(3), "a": torch.ones(4)})])
    leaves, spec = internals.pytree.tree_flatten(outputs)
    data = json.loads(json.dumps(internals.tree_to_json(spec)))
    assert data["class"][1] == {"sample": {"list": [0, {"tuple": [1, {"dict": {"b": 2, "a": 3}}]}]}}
    assert internals.tree_from_json(data, 4) == spec
    back = internals.pytree.tree_unflatten(leaves, internals.tree_from_json(data, 4))
    assert type(back) is UNet2DConditionOutput and back.sample[1][1]["a"].shape == (4,)
    for wrong in (
        {"tuple": [0, 0]}, {"tuple": [1, 0]}, {"tuple": [0]}, {"tuple": [0, 1], "list": []}, {"set": [0, 1]},
        {"class": ["os.system", {"a": 0, "b": 1}]}, {"class": ["collections.namedtuple", {"a": 0, "b": 1}]},
        [0, 1], None, {}, {"class": [{}, {"a": 0, "b": 1}]},
        {"class": ["builtins.dict"]}, {"tuple": {"0": 0, "1": 1}},
    ):  # fmt: skip
        with pytest.raises(TypeError, match="outputs"):
            internals.tree_from_json(wrong, 2)
    with pytest.raises(TypeError, match="no spelling"):
        internals.tree_to_json(internals.pytree.tree_flatten(torch.return_types.max(torch.ones(2)))[1])


def test_without_guards_two_sizes_that_are_compared_stay_two():
    """And with them they become one, which is why passes run without."""
    environment = internals.SizeEnvironment({"s0": 4, "s1": 4})
    with environment.fake_mode:
        first, second = (torch.empty(environment.size("int", environment.atom(name), 4)) for name in ("s0", "s1"))
        with internals.without_guards():
            assert internals.hint((first + second).shape[0]) == 4
        assert internals.symbols_of(first.shape[0]).isdisjoint(internals.symbols_of(second.shape[0]))
        first - second  # another operator, because what one gives is remembered
    assert internals.symbols_of(first.shape[0]) == internals.symbols_of(second.shape[0])


def test_fake_tensors_compute_shapes_only():
    with internals.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.ones(3, 4))
        assert (fake @ fake.T).shape == (3, 3)
    mode = internals.fake_mode_with_sizes()
    assert mode.shape_env is not None
    assert mode.from_tensor(torch.ones(3, 4), static_shapes=True).shape == (3, 4)


def test_storages_of_fake_views_are_one():
    with internals.FakeTensorMode():
        a, b = torch.empty(4, 4), torch.empty(4, 4)
        assert internals.storage_id(a) == internals.storage_id(a[1:]) != internals.storage_id(b)


def test_a_lazy_graph_module_runs():
    graph = Graph()
    graph.output((graph.call_function(torch.add, (graph.placeholder("x"), 1)),))
    (result,) = internals.lazy_graph_module(nn.Module(), graph)(torch.ones(2))
    assert result.tolist() == [2, 2]


def test_a_graph_is_sorted():
    graph = Graph()
    x = graph.placeholder("x")
    late = graph.call_function(torch.neg, (x,))
    with graph.inserting_before(late):
        early = graph.call_function(torch.abs, (x,))
    early.args = (late,)  # used before it is made
    graph.output((early,))
    graph_module = GraphModule(nn.Module(), graph)
    internals.legalize_graph(graph_module)
    graph_module.graph.lint()
    assert graph_module(torch.ones(1))[0].item() == 1


def test_a_cast_never_aliases():
    x = torch.ones(2)
    assert internals.to_copy(x, dtype=torch.float32).data_ptr() != x.data_ptr()


def test_the_flop_counter_lacks_the_attention_of_a_cpu():
    q = torch.ones(1, 2, 8, 16)
    for known, expected in (({}, 0), ({internals.CPU_ATTENTION: lambda *shapes, **_: 5}, 5)):
        with FlopCounterMode(display=False, custom_mapping=known) as counter, torch.no_grad():
            internals.CPU_ATTENTION(q, q, q)
        assert counter.get_total_flops() == expected


def test_in_place_writes_are_counted():
    x = torch.ones(2)
    before = internals.version(x)
    x.add_(1)
    assert internals.version(x) == before + 1
    with torch.inference_mode():
        assert internals.version(torch.ones(1)) is None


def test_slots_are_the_module_s_own():
    module = nn.BatchNorm1d(2)
    parameters, buffers = internals.slots(module)
    module.weight = nn.Parameter(torch.full((2,), 7.0))
    module.running_mean = torch.full((2,), 3.0)
    assert parameters["weight"] is module.weight and buffers["running_mean"] is module.running_mean


def test_a_module_calls_what_is_set_in_the_place_of_itself():
    module = nn.Linear(1, 1)
    x = torch.ones(1, 1)
    expected = module(x)
    seen = []
    module.register_forward_hook(lambda *_: seen.append("hook"))
    vars(module)[internals.COMPILED_CALL] = lambda x: x + 41
    assert module(x).item() == 42 and seen == []
    assert torch.equal(internals.plain_call(module)(x), expected) and seen == ["hook"]
    for twin in (copy.deepcopy(nn.Linear(1, 1)), pickle.loads(pickle.dumps(nn.Linear(1, 1)))):
        assert vars(twin).get(internals.COMPILED_CALL) is None
    module.compile(backend="eager")
    assert callable(vars(module)[internals.COMPILED_CALL])


def test_what_torch_compile_returns_keeps_the_module():
    net = nn.Linear(2, 2)
    assert internals.is_torch_compiled(torch.compile(net, backend="eager"))
    net.compile(backend="eager")
    assert not internals.is_torch_compiled(net)  # that sets _compiled_call_impl


@pytest.mark.slow
def test_inductor_compiles_a_graph_and_a_shared_body():
    body = Graph()
    a, w = body.placeholder("a"), body.placeholder("w")
    body.output((body.call_function(aten.sin.default, (body.call_function(aten.mm.default, (a, w)),)),))
    graph = Graph()
    x, first, second = (graph.placeholder(name) for name in ("x", "first", "second"))
    value = x
    for weight in (first, second):
        call = graph.call_function(internals.invoke_subgraph, (graph.get_attr("body_0"), "body_0", value, weight))
        value = graph.call_function(operator.getitem, (call, 0))
    graph.output((value,))
    root = nn.Module()
    root.add_module("body_0", GraphModule(nn.Module(), body))
    inputs = [torch.randn(4, 4) for _ in range(3)]
    internals.load_inductor()
    internals.probe_cpu()
    mode = internals.fake_mode_with_sizes()
    fakes = [mode.from_tensor(value, static_shapes=True) for value in inputs]
    (found,) = internals.compile_with_inductor(GraphModule(root, graph), fakes, "default")(*inputs)
    expected = (inputs[0] @ inputs[1]).sin() @ inputs[2]
    assert torch.allclose(found, expected.sin(), atol=1e-5)


def test_modes_of_inductor_are_those_of_torch_compile():
    import torch._inductor

    assert torch._inductor.list_mode_options("reduce-overhead")["triton.cudagraphs"] is True
    assert torch._inductor.list_mode_options("max-autotune")["max_autotune"] is True


def test_hooks_of_diffusers_are_found_by_name():
    model = diffusers.AutoencoderTiny()
    assert internals.hook_names(model) is None

    class Noop(diffusers.hooks.ModelHook):
        pass

    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(Noop(), "noop")
    assert internals.hook_names(model) == ["noop"]
    registry.remove_hook("noop")
    assert internals.hook_names(model) == []


def test_progress_bar_settings_are_read_back():
    pipe = diffusers.DDIMPipeline(unet=diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ), scheduler=diffusers.DDIMScheduler())  # fmt: skip
    assert internals.progress_bar_settings(pipe) == {}
    pipe.set_progress_bar_config(disable=True)
    assert internals.progress_bar_settings(pipe) == {"disable": True}


def test_the_attention_backend_is_what_diffusers_was_told():
    from diffusers.models import attention_dispatch

    plain = internals.attention_backend()
    assert plain == attention_dispatch.AttentionBackendName.NATIVE
    with attention_dispatch.attention_backend("_native_math"):
        assert internals.attention_backend() == attention_dispatch.AttentionBackendName._NATIVE_MATH
    assert internals.attention_backend() == plain


def test_what_is_registered_stands_in_dictionaries_of_the_module():
    net = nn.Sequential(nn.Linear(2, 2))
    assert internals.children(net) == {"0": net[0]} and internals.children(net) is vars(net)["_modules"]
    assert [vars(net[0])[name] for name in internals.REGISTERED] == [*internals.slots(net[0]), {}]


def test_hooks_around_all_modules_are_seen():
    assert not internals.global_hooks()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert internals.global_hooks()
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    assert internals.global_hooks()
    handle.remove()
    assert not internals.global_hooks()
