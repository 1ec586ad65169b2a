"""Capture of tiny modules: canonical calls, live weights, symbolic sizes, and what cannot be exported."""

import logging

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from dcc.capture.export import capture
from dcc.errors import CaptureError
from dcc.passes.verify import is_mutation, verify
from dcc.record.call import bind

NONE = frozenset()
SHAPES = (2, 8), (1, 8), (2, 3, 8)


class Keywords(nn.Module):
    """Takes everything that a denoiser may take."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, timestep, context=None, extra=None, scale: float = 1.0, return_dict: bool = True):
        y = self.linear(x) * scale + timestep
        for value in context or ():
            y = y + value
        if extra is not None:
            y = y * extra["gain"] + extra["bias"]
        return {"sample": y} if return_dict else (y,)


def serves(captured, module, call):
    """Whether the graph accepts the call and gives the eager module's outputs bit for bit."""
    with torch.no_grad():
        expected, spec = pytree.tree_flatten(module(**call.arguments()))
        found = captured.graph_module(*captured.inputs_of(call))
    assert spec == captured.out_spec
    return captured.accepts(call) and len(found) == len(expected) and all(map(torch.equal, found, expected))


def captured_from(module, *args, as_tensors=NONE, **kwargs):
    call = bind(module, args, kwargs, as_tensors)
    captured = capture(module, call)
    assert captured.problem is None, captured.problem
    return captured, call


def test_positional_and_keyword_spellings_are_one_call():
    module, x, t = Keywords(), torch.randn(2, 8), torch.tensor(3.0)
    calls = [
        bind(module, (x, t), {}, NONE),
        bind(module, (x,), {"timestep": t}, NONE),
        bind(module, (), {"timestep": t, "x": x, "scale": 1.0}, NONE),
    ]
    assert len({call.signature for call in calls}) == 1
    assert all(call.names == ("x", "timestep") for call in calls)
    assert all(call.tensors[0] is x and call.tensors[1] is t for call in calls)
    captured = capture(module, calls[0])
    assert all(serves(captured, module, call) for call in calls)


def test_other_constants_dtypes_and_structures_are_other_signatures():
    module, x, t = Keywords(), torch.randn(2, 8), torch.tensor(3.0)
    captured, _ = captured_from(module, x, t)
    for other in (
        bind(module, (x, t), {"scale": 2.0}, NONE),
        bind(module, (x, t), {"return_dict": False}, NONE),
        bind(module, (x, t), {"context": [x]}, NONE),
        bind(module, (x.double(), t), {}, NONE),
        bind(module, (x[None], t), {}, NONE),
    ):
        assert not captured.accepts(other)


def test_lists_and_dicts_have_readable_paths():
    module = Keywords()
    extra = {"gain": torch.randn(8), "bias": torch.randn(8)}
    captured, call = captured_from(
        module, torch.randn(2, 8), torch.tensor(3.0), [torch.randn(8), torch.randn(2, 8)], extra, return_dict=False
    )
    assert call.names == ("x", "timestep", "context.0", "context.1", "extra.gain", "extra.bias")
    assert call.constants == {"scale": 1.0, "return_dict": False}
    assert serves(captured, module, call)
    arguments = call.arguments()
    assert arguments["extra"]["gain"] is extra["gain"]
    assert isinstance(arguments["context"], list)


def test_variable_keywords_are_named_like_others():
    class Open(nn.Module):
        def forward(self, x, **kwargs):
            return x * kwargs["gain"]

    captured, call = captured_from(Open(), torch.randn(2, 8), gain=torch.tensor(2.0))
    assert call.names == ("x", "gain")
    assert serves(captured, Open(), call)


def test_a_number_as_tensor_serves_every_value():
    module, x = Keywords(), torch.randn(2, 8)
    names = frozenset({"timestep"})
    captured, call = captured_from(module, x, 3.5, as_tensors=names)
    assert call.names == ("x", "timestep")
    assert call.tensors[1].dtype == torch.float64  # a Python number has as many digits
    other = bind(module, (x, 9.25), {}, names)
    assert serves(captured, module, other)
    (found,) = captured.graph_module(*captured.inputs_of(other))
    assert torch.equal(found, module(x, 9.25)["sample"])
    assert bind(module, (x, 4), {}, names).tensors[1].dtype == torch.int64


def test_a_number_is_a_constant_otherwise():
    module, x = Keywords(), torch.randn(2, 8)
    captured, call = captured_from(module, x, 3.5)
    assert call.constants["timestep"] == 3.5
    assert not captured.accepts(bind(module, (x, 9.25), {}, NONE))


@pytest.mark.parametrize(
    ("kwargs", "name", "kind"),
    [
        ({"context": [object()]}, "context.0", "object"),
        ({"extra": {"gain": 1j}}, "extra.gain", "complex"),
        ({"scale": {1, 2}}, "scale", "set"),
    ],
    ids=["list", "dict", "set"],
)
def test_unsupported_types_name_the_argument(kwargs, name, kind):
    with pytest.raises(CaptureError, match=rf"argument '{name}' of Keywords is a {kind}; dcc takes"):
        bind(Keywords(), (torch.ones(2, 8), torch.ones(())), kwargs, NONE)


def test_bind_raises_as_forward_would():
    with pytest.raises(TypeError, match="missing a required argument: 'timestep'"):
        bind(Keywords(), (torch.ones(2, 8),), {}, NONE)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        bind(Keywords(), (torch.ones(2, 8), 1.0), {"colour": 1}, NONE)


def test_position_only_arguments_are_refused():
    class Positional(nn.Module):
        def forward(self, *tensors):
            return tensors[0]

    with pytest.raises(CaptureError, match=r"Positional\.forward takes 'tensors' by position only"):
        bind(Positional(), (torch.ones(2),), {}, NONE)


def test_contiguous_copies_only_what_is_not_dense():
    x, t = torch.randn(8, 2).T, torch.tensor(3.0)
    call = bind(Keywords(), (x, t), {}, NONE).contiguous()
    assert call.tensors[0].is_contiguous()
    assert torch.equal(call.tensors[0], x)
    assert call.tensors[1] is t


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (3, 5), (5, 9), (2, 1)])
def test_batch_and_length_stay_symbolic(stack, batch, length):
    call = bind(stack.module, (torch.randn(batch, length, 8), torch.rand(batch)), {}, NONE)
    assert serves(stack.captured, stack.module, call)


def test_sizes_that_belong_together_must_agree(stack):
    assert not stack.captured.accepts(bind(stack.module, (torch.randn(2, 5, 8), torch.rand(3)), {}, NONE))


def test_sizes_that_the_weights_fix_are_checked(stack):
    assert not stack.captured.accepts(bind(stack.module, (torch.randn(2, 5, 9), torch.rand(2)), {}, NONE))


def add_in_place(module):
    module.linear.weight.data += torch.randn(8, 1) @ torch.randn(1, 8)  # as a fused LoRA does


def fill_in_place(module):
    with torch.no_grad():
        module.linear.bias.fill_(3.0)


def replace_parameter(module):
    module.linear.weight = nn.Parameter(torch.randn(8, 8))


def replace_data(module):
    module.linear.weight.data = torch.randn(8, 8)


def load(module):
    module.load_state_dict(Keywords().state_dict())


@pytest.mark.parametrize("change", [add_in_place, fill_in_place, replace_parameter, replace_data, load])
def test_weights_are_live(change):
    module = Keywords()
    captured, call = captured_from(module, torch.randn(2, 8), torch.tensor(3.0))
    before = module(**call.arguments())["sample"]
    change(module)
    assert not torch.equal(module(**call.arguments())["sample"], before)
    assert serves(captured, module, call)


def test_a_weight_that_is_gone_says_so():
    module = Keywords()
    captured, call = captured_from(module, torch.randn(2, 8), torch.tensor(3.0))
    module.linear.bias = None
    with pytest.raises(CaptureError, match=r"weight 'linear\.bias' was there at capture and is gone now"):
        captured.bindings(call)


class Branching(nn.Module):
    """torch.export cannot follow a branch on a tensor's value."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, t):
        return {"sample": self.linear(x) if x.sum() > 0 else -x, "t": t * 2}


def test_what_cannot_be_exported_is_one_opaque_node():
    module, x, t = Branching(), torch.ones(2, 8), torch.ones(2)
    logging.disable(logging.WARNING)  # torch prints the graph that it gave up on
    try:
        captured = capture(module, bind(module, (x, t), {}, NONE))
    finally:
        logging.disable(logging.NOTSET)
    assert "dynamic shapes: " in captured.problem
    assert "fixed shapes: " in captured.problem
    operations = [node.op for node in captured.graph_module.graph.nodes]
    assert operations.count("call_module") == 1
    verify(captured.graph_module, "test")
    for sample in (x, -x, torch.ones(3, 8)):
        assert serves(captured, module, bind(module, (sample, t), {}, NONE))
    add_in_place(module)
    assert serves(captured, module, bind(module, (x, t), {}, NONE))


def test_an_opaque_module_must_return_tensors():
    class Odd(nn.Module):
        def forward(self, x):
            return (x if x.sum() > 0 else -x), "done"

    logging.disable(logging.WARNING)
    try:
        with pytest.raises(CaptureError, match="Odd returns values that are not tensors"):
            capture(Odd(), bind(Odd(), (torch.ones(2),), {}, NONE))
    finally:
        logging.disable(logging.NOTSET)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        y.add_(1).relu_()
        y[:, :2] = 0
        return y


class WritesInput(nn.Module):
    def forward(self, x):
        x.add_(1)
        return x * 2


class WritesBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return x * 2


@pytest.mark.parametrize("kind", [InPlace, WritesInput, WritesBuffer])
def test_in_place_operations_end_functional(kind):
    module, x = kind(), torch.randn(2, 8)
    captured = capture(module, bind(module, (x.clone(),), {}, NONE))
    if captured.problem is None:
        assert not any(is_mutation(node) for node in captured.graph_module.graph.nodes)
    assert (captured.problem is None) == (kind is InPlace)
    other = torch.randn(3, 8)
    found = captured.graph_module(*captured.inputs_of(bind(module, (other.clone(),), {}, NONE)))
    assert len(found) == captured.out_spec.num_leaves == 1
    assert torch.equal(found[0], module(other.clone()))


def test_agrees_compares_with_the_eager_module_once_per_shape():
    module = Keywords()
    captured, call = captured_from(module, torch.randn(2, 8), torch.tensor(3.0))
    captured.proven.clear()
    with torch.no_grad():
        assert not captured.agrees(Keywords(), call)
        assert captured.agrees(module, call)
        assert captured.agrees(Keywords(), call)  # the shape is proven
    other = [value + 1 for value in captured.graph_module(*captured.inputs_of(call))]
    assert not captured.gives(call, other)
    assert not captured.gives(bind(module, (torch.randn(2, 9), torch.tensor(3.0)), {}, NONE), other)


def test_a_graph_that_disagrees_is_not_kept():
    """A module that answers otherwise while it is traced, at no level that the first call shows."""

    class Sly(nn.Module):
        def forward(self, x, t):
            return x * (2 if torch.compiler.is_exporting() else 3)

    captured = capture(Sly(), bind(Sly(), (torch.randn(2, 8), torch.tensor(3.0)), {}, NONE))
    assert "the graph gives other values than the module" in captured.problem
    assert serves(captured, Sly(), captured.call)


def test_outputs_that_are_inputs():
    class PassedOn(nn.Module):
        def forward(self, x):
            return x, {"double": x * 2}

    captured, call = captured_from(PassedOn(), torch.randn(2, 8))
    assert serves(captured, PassedOn(), call)
