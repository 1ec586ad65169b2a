"""Changes of values: plain attributes, buffers, parameters, loaded weights, types and layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from .loops import Loop
from .parts import Knobs, Shift, block, knobs, linear, noise, put
from .table import Undo, change


def mlp(loop: Loop) -> Any:
    return block(loop).ff


# ---------------------------------------------------------------- attributes
def knob(**options: Any) -> Any:
    return change("attribute", base=knobs, **options)


@change("attribute")
def a_number_that_a_library_s_layer_reads(loop: Loop) -> Undo | None:
    norm = block(loop).norm1.norm if loop.model == "dit" else block(loop).norm1
    return put(norm, "eps", 0.5)


@change("attribute")
def a_number_of_the_time_embedding(loop: Loop) -> Undo | None:
    return put(loop.net.time_text_embed.time_proj if loop.model == "dit" else loop.net.time_proj, "scale", 2)


@change("attribute", models=("dit",))
def a_string_that_a_library_s_layer_reads(loop: Loop) -> Undo | None:
    return put(block(loop).ff.net[0], "approximate", "none")


@knob()
def a_number(loop: Loop) -> Undo | None:
    return put(mlp(loop), "number", 0.8)


@knob()
def a_number_of_another_type(loop: Loop) -> Undo | None:
    return put(mlp(loop), "whole", 2.5)


@knob()
def a_flag(loop: Loop) -> Undo | None:
    return put(mlp(loop), "flag", True)


@knob()
def a_string(loop: Loop) -> Undo | None:
    return put(mlp(loop), "text", "subtract")


@knob()
def None_to_a_number(loop: Loop) -> Undo | None:
    return put(mlp(loop), "nothing", 0.5)


@knob()
def an_element_of_a_list(loop: Loop) -> Undo | None:
    items = mlp(loop).items
    items[0] = 0.7
    return lambda: items.__setitem__(0, 0.1)


@knob()
def an_element_added_to_a_list(loop: Loop) -> Undo | None:
    items = mlp(loop).items
    items.append(0.7)
    return items.pop


@knob()
def an_entry_of_a_dict(loop: Loop) -> Undo | None:
    table = mlp(loop).table
    table["a"] = 0.7
    return lambda: table.__setitem__("a", 0.3)


@knob()
def an_element_of_a_set(loop: Loop) -> Undo | None:
    names = mlp(loop).names
    names.add("b")
    return lambda: names.remove("b")


@knob()
def a_tuple(loop: Loop) -> Undo | None:
    return put(mlp(loop), "pair", (1.5, 2.0))


@knob()
def an_attribute_of_a_nested_object(loop: Loop) -> Undo | None:
    return put(mlp(loop).nested.inner, "gain", 1.2)


@knob()
def a_function(loop: Loop) -> Undo | None:
    return put(mlp(loop), "function", torch.tanh)


@knob()
def an_attribute_of_the_class(loop: Loop) -> Undo | None:
    Knobs.gain = 1.5
    return lambda: setattr(Knobs, "gain", 1.0)


@knob()
def an_attribute_of_the_class_that_the_instance_hides(loop: Loop) -> Undo | None:
    return put(mlp(loop), "gain", 1.5)


@knob()
def a_number_of_a_module_that_is_not_registered(loop: Loop) -> Undo | None:
    return put(mlp(loop).parts[0], "by", 0.5)


@knob()
def a_module_that_is_not_registered_replaced(loop: Loop) -> Undo | None:
    parts = mlp(loop).parts
    before, parts[0] = parts[0], Shift(0.6)
    return lambda: parts.__setitem__(0, before)


# ---------------------------------------------------------------- tensors that are no parameters
@knob()
def a_tensor_in_a_list_replaced(loop: Loop) -> Undo | None:
    tensors = mlp(loop).tensors
    before, tensors[0] = tensors[0], torch.full((1,), 0.9)
    return lambda: tensors.__setitem__(0, before)


@knob()
def a_tensor_in_a_list_written(loop: Loop) -> Undo | None:
    tensor = mlp(loop).tensors[0]
    tensor.fill_(0.9)
    return lambda: tensor.fill_(0.1)


@knob()
def a_tensor_of_a_nested_object_replaced(loop: Loop) -> Undo | None:
    return put(mlp(loop).plain, "tensor", torch.full((1,), 0.9))


@change("buffer", base=knobs)
def a_buffer_replaced(loop: Loop) -> Undo | None:
    before, mlp(loop).shift = mlp(loop).shift, torch.full((1,), 0.9)
    return lambda: setattr(mlp(loop), "shift", before)


@change("buffer", base=knobs)
def a_buffer_written(loop: Loop) -> Undo | None:
    mlp(loop).shift.fill_(0.9)
    return lambda: mlp(loop).shift.fill_(0.3)


@change("buffer", base=knobs)
def a_buffer_written_through_data(loop: Loop) -> Undo | None:
    mlp(loop).shift.data = torch.full((1,), 0.9)
    return lambda: setattr(mlp(loop).shift, "data", torch.full((1,), 0.3))


@change("buffer", base=knobs)
def a_buffer_that_is_not_persistent(loop: Loop) -> Undo | None:
    mlp(loop).passing.fill_(0.9)
    return lambda: mlp(loop).passing.fill_(0.4)


@change("buffer", base=knobs)
def a_buffer_where_none_was(loop: Loop) -> Undo | None:
    mlp(loop).absent = torch.full((1,), 0.5)
    return lambda: setattr(mlp(loop), "absent", None)


@change("buffer", base=knobs)
def a_buffer_of_another_shape(loop: Loop) -> Undo | None:
    before = mlp(loop).shift
    mlp(loop).shift = noise(mlp(loop).mlp.net[2].bias)
    return lambda: setattr(mlp(loop), "shift", before)


# ---------------------------------------------------------------- parameters
@change("parameter")
def a_parameter_replaced(loop: Loop) -> Undo | None:
    weight = linear(loop).weight
    return put(linear(loop), "weight", nn.Parameter(weight + noise(weight), requires_grad=False))


@change("parameter")
def a_parameter_written(loop: Loop) -> Undo | None:
    weight = linear(loop).weight
    before = weight.clone()
    with torch.no_grad():
        weight.add_(noise(weight))
    return lambda: weight.copy_(before)


@change("parameter")
def a_parameter_s_data_replaced(loop: Loop) -> Undo | None:
    weight = linear(loop).weight
    before = weight.data
    weight.data = before + noise(before)
    return lambda: setattr(weight, "data", before)


@change("parameter", effect=False)
def a_parameter_that_requires_gradients_without_any_asked(loop: Loop) -> Undo | None:
    linear(loop).weight.requires_grad_(True)
    return lambda: linear(loop).weight.requires_grad_(False)


@change("parameter")
def a_parameter_tied_to_another(loop: Loop) -> Undo | None:
    first, second = block(loop).ff.net[2], _another(loop)
    return put(first, "weight", second.weight)


def _another(loop: Loop) -> nn.Linear:
    """A layer of the same shape in another branch."""
    if loop.model == "dit":
        return block(loop).ff_context.net[2]
    return loop.net.up_blocks[0].attentions[0].transformer_blocks[0].ff.net[2]


@change("parameter")
def a_bias_taken_away(loop: Loop) -> Undo | None:
    return put(linear(loop), "bias", None)


@change("parameter", effect=False)
def all_parameters_moved_to_new_storage(loop: Loop) -> Undo | None:
    for parameter in loop.net.parameters():
        parameter.data = parameter.data.clone()
    return lambda: None


@change("parameter")
def two_parameters_exchanged(loop: Loop) -> Undo | None:
    first, second = linear(loop), _another(loop)

    def exchange() -> None:
        first.weight, second.weight = second.weight, first.weight

    exchange()
    return exchange


@change("loaded weights")
def a_state_dict_loaded(loop: Loop) -> Undo | None:
    before = {name: value.clone() for name, value in loop.net.state_dict().items()}
    loop.net.load_state_dict({name: value + noise(value) for name, value in before.items()})
    return lambda: loop.net.load_state_dict(before)


@change("loaded weights")
def a_state_dict_assigned(loop: Loop) -> Undo | None:
    before = dict(loop.net.state_dict())
    loop.net.load_state_dict({name: value + noise(value) for name, value in before.items()}, assign=True)
    return lambda: loop.net.load_state_dict(before, assign=True)


# ---------------------------------------------------------------- parameters that are computed
class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 0.5 * weight


@change("parametrization")
def a_parametrization(loop: Loop) -> Undo | None:
    parametrize.register_parametrization(linear(loop), "weight", Halved())
    return lambda: _without_parametrization(linear(loop))


def _without_parametrization(layer: nn.Module) -> None:
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    layer.requires_grad_(False)


@change("parametrization", effect=None)
def weight_norm(loop: Loop) -> Undo | None:
    before = linear(loop).weight.detach().clone()
    parametrizations.weight_norm(linear(loop))

    def undo() -> None:
        parametrize.remove_parametrizations(linear(loop), "weight")
        linear(loop).weight = nn.Parameter(before, requires_grad=False)

    return undo


@change("parametrization")
def pruning(loop: Loop) -> Undo | None:
    before = linear(loop).weight.detach().clone()
    prune.l1_unstructured(linear(loop), "weight", amount=0.5)

    def undo() -> None:
        prune.remove(linear(loop), "weight")
        linear(loop).weight = nn.Parameter(before, requires_grad=False)

    return undo


# ---------------------------------------------------------------- types and layouts
def _saved(loop: Loop, dtype: torch.dtype = torch.float32) -> Undo:
    """Puts back the parameters' type and values."""
    before = {name: value.clone() for name, value in loop.net.state_dict().items()}

    def undo() -> None:
        nn.Module.to(loop.net, dtype)
        loop.net.load_state_dict(before)
        loop.dtype = dtype

    return undo


@change("type")
def to_bfloat16(loop: Loop) -> Undo | None:
    undo = _saved(loop)
    nn.Module.to(loop.net, torch.bfloat16)  # the library's own would print a warning
    loop.dtype = torch.bfloat16
    return undo


@change("type")
def to_half(loop: Loop) -> Undo | None:
    undo = _saved(loop)
    nn.Module.to(loop.net, torch.float16)
    loop.dtype = torch.float16
    return undo


@change("type")
def to_double(loop: Loop) -> Undo | None:
    undo = _saved(loop)
    nn.Module.to(loop.net, torch.float64)
    loop.dtype = torch.float64
    return undo


@change("type")
def one_submodule_to_another_type(loop: Loop) -> Undo | None:
    """The original raises, because its types do not fit."""
    undo = _saved(loop)
    block(loop).ff.to(torch.bfloat16)
    return undo


@change("layout", effect=None)
def channels_last(loop: Loop) -> Undo | None:
    loop.net.to(memory_format=torch.channels_last)
    return lambda: loop.net.to(memory_format=torch.contiguous_format)


@change("layout", effect=False)
def a_weight_that_is_not_contiguous(loop: Loop) -> Undo | None:
    weight = linear(loop).weight
    return put(linear(loop), "weight", nn.Parameter(weight.T.contiguous().T, requires_grad=False))


@change("storage")
def weights_on_the_meta_device(loop: Loop) -> Undo | None:
    """The original raises, or answers with a tensor that has no values."""
    before = dict(loop.net.named_parameters())
    data = {name: parameter.data for name, parameter in before.items()}
    loop.net.to("meta")

    def undo() -> None:
        loop.net.load_state_dict({name: value.clone() for name, value in data.items()}, assign=True)
        loop.net.requires_grad_(False)

    return undo


@change("storage")
def a_weight_that_is_paged_out(loop: Loop) -> Undo | None:
    weight = linear(loop).weight
    before = weight.data
    weight.data = torch.empty(0)
    return lambda: setattr(weight, "data", before)
