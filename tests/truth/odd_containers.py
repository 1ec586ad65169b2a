"""Odd modules by what they take and give: lists, dicts, dataclasses, named tuples, None, strings, the input itself."""

from __future__ import annotations

import collections
import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from .odd_modules import LEVELS, Net, Prompt, See, first_of, level, odd


def giving(*arguments: Any, **named: Any) -> Any:
    """A loop that gives the denoiser more: every argument may be a function of the prompt."""

    def loop(net: Any, prompt: Prompt, see: See) -> Tensor:
        def of(value: Any) -> Any:
            return value(prompt) if callable(value) else value

        more, by_name = [of(value) for value in arguments], {name: of(value) for name, value in named.items()}
        x = prompt.x
        with torch.no_grad():
            for value in LEVELS:
                out = net(x, level(x, value), *more, **by_name)
                see(out, more, by_name)
                x = x - 0.1 * first_of(out)
        return x

    return loop


def text(prompt: Prompt) -> Tensor:
    """The text itself."""
    return prompt.ctx


@odd("containers", loop=giving(lambda p: [p.ctx, p.ctx * 2] if p.index % 2 else (p.ctx, p.ctx * 2)))
class ListOrTuple(Net):
    """Gives back the kind of sequence that it was given, and computes otherwise for a list."""

    def forward(self, x, t, texts):
        h = self.hidden(x, t, torch.cat(list(texts), 1))
        return type(texts)([self.out(h.sin() if isinstance(texts, list) else h), h])


@odd("containers", loop=giving(text, lambda p: {"scale": 0.5, "bias": p.ctx[:, :1, :4]}))
class PopsFromADict(Net):
    """Takes an entry out of the caller's dict, which is not there at the next step."""

    def forward(self, x, t, ctx, extra):
        return super().forward(x, t, ctx) * extra.pop("scale", 1.0) + extra["bias"]


@odd("containers", loop=giving(text, extra=lambda p: {}))
class WritesToADict(Net):
    """Puts its features into the caller's dict."""

    def forward(self, x, t, ctx, extra=None):
        h = self.hidden(x, t, ctx)
        extra["features"] = h
        return self.out(h)


@odd("containers", loop=giving(text, extra=lambda p: []))
class AppendsToAList(Net):
    """Appends its features to the caller's list."""

    def forward(self, x, t, ctx, extra):
        h = self.hidden(x, t, ctx)
        extra.append(h.mean())
        return self.out(h)


@dataclass
class Answer:
    """What a module may give back."""

    sample: Tensor
    features: Tensor | None = None

    def __getitem__(self, index: int) -> Any:
        return (self.sample, self.features)[index]


@odd("containers", loop=giving(text), refused="not tensors")
class GivesADataclass(Net):
    """Answers with a dataclass."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return Answer(self.out(h), h)


@odd("containers", loop=giving(lambda p: Answer(p.ctx, p.ctx * 2)), refused="argument 'texts'")
class TakesADataclass(Net):
    """Takes a dataclass of tensors."""

    def forward(self, x, t, texts):
        return self.out(self.hidden(x, t, texts.sample) + self.hidden(x, t, texts.features))


class Texts(NamedTuple):
    """A named tuple of tensors and a number."""

    main: Tensor
    other: Tensor
    scale: float = 1.0


@odd("containers", loop=giving(lambda p: Texts(p.ctx, p.ctx[:, :2], 0.5)), refused="not tensors", long=True)
class NamedTuples(Net):
    """Takes a named tuple and gives one."""

    def forward(self, x, t, texts):
        out = self.out(self.hidden(x, t, texts.main) + texts.scale * self.hidden(x, t, texts.other))
        return texts._replace(main=out)


@odd(
    "containers",
    loop=giving(lambda p: {"a": {"b": [p.ctx, None, ("c", 2)]}, "scales": {1: 0.5, 2: 2.0}}),
    refused="not tensors",
)
class NestedDicts(Net):
    """Takes dicts of dicts of lists, and gives such."""

    def forward(self, x, t, given):
        ctx, nothing, (name, number) = given["a"]["b"]
        out = super().forward(x, t, ctx) * given["scales"][1]
        return {"sample": out, "more": {name: [nothing, out * number], "numbers": given["scales"]}}


@odd("containers", loop=giving(text), refused="not tensors")
class GivesNone(Net):
    """Answers with a tensor and None."""

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx), None


@dataclass
class Output(BaseOutput):
    """An answer of the kind that diffusers has."""

    sample: Tensor
    features: list[Tensor] | None = None


@odd("containers", loop=giving(text, return_dict=lambda p: p.index % 2 == 0))
class GivesAModelOutput(Net):
    """Answers with a ModelOutput or a tuple, as diffusers' denoisers do."""

    def forward(self, x, t, ctx, return_dict=True):
        h = self.hidden(x, t, ctx)
        return Output(self.out(h), [h, h * 2]) if return_dict else (self.out(h), [h, h * 2])


@odd("containers", loop=giving(text))
class GivesItsInput(Net):
    """Gives back, beside its answer, the very tensors that it was given."""

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx), x, ctx


@odd("containers", loop=giving(text))
class GivesOneTensorTwice(Net):
    """The same tensor stands twice in its answer."""

    def forward(self, x, t, ctx):
        out = super().forward(x, t, ctx)
        return {"sample": out, "prediction": out, "parts": [out[:, :1], out]}


@odd("containers", loop=giving(text), refused="not tensors")
class GivesWordsAndNumbers(Net):
    """Strings, ints, sizes and types stand beside the tensor."""

    def forward(self, x, t, ctx):
        out = super().forward(x, t, ctx)
        return out, "epsilon", x.shape[1], 0.18215, out.dtype, out.shape


@odd("containers", loop=giving(text), refused="not tensors")
class GivesReadNumbers(Net):
    """A float that was read from its answer stands beside it."""

    def forward(self, x, t, ctx):
        out = super().forward(x, t, ctx)
        return out, float(out.mean())


@odd("containers", loop=giving(text, lambda p: p.ctx[:, :0]))
class EmptyTensors(Net):
    """Takes a tensor without elements, and gives one."""

    def forward(self, x, t, ctx, more):
        return super().forward(x, t, torch.cat([ctx, more], 1)), more, x[:0]


@odd("containers", loop=giving(text))
class GivesNumbersAsTensors(Net):
    """Tensors without dimensions stand beside the answer, one of them of integers."""

    def forward(self, x, t, ctx):
        out = super().forward(x, t, ctx)
        return out, out.mean(), (out > 0).sum()


@odd("containers", loop=giving(text), long=True)
class GivesAsManyAsItNeeds(Net):
    """As many tensors as there are tokens."""

    def forward(self, x, t, ctx):
        out = super().forward(x, t, ctx)
        return [out, *out.unbind(1)]


@odd("containers", loop=giving(lambda p: {"a.b": p.ctx, "a": {"b": p.ctx[:, :1]}}))
class NamesWithDots(Net):
    """Two entries whose paths are spelled alike."""

    def forward(self, x, t, given):
        return self.out(self.hidden(x, t, given["a.b"]) - self.hidden(x, t, given["a"]["b"]))


@odd("containers", loop=giving(type=text, input=lambda p: 2.0, self_=lambda p: p.ctx.mean(1)), long=True)
class NamesOfBuiltins(Net):
    """Arguments are named as Python's own functions are."""

    def forward(self, x, t, *, type, input, self_):
        return super().forward(x, t, type) * input + self_[:, None, :4]


class Mode(enum.Enum):
    """A choice."""

    SINE = "sin"
    COSINE = "cos"


@odd("containers", loop=giving(text, lambda p: list(Mode)[p.index % 2]), refused="argument 'mode'")
class TakesAnEnum(Net):
    """An enumeration chooses what is computed."""

    def forward(self, x, t, ctx, mode):
        return self.out(getattr(torch, mode.value)(self.hidden(x, t, ctx)))


class KeyValues:
    """A cache that its user gives to every call of a generation."""

    def __init__(self):
        self.keys, self.calls = [], 0

    def update(self, h):
        self.calls += 1
        self.keys.append(h)
        return torch.cat(self.keys, 1)


@odd("containers", loop=giving(text, cache=lambda p: KeyValues()), uncacheable=True, refused="argument 'cache'")
class TakesACache(Net):
    """Appends to an object that it is given, and attends to all that is in it."""

    def forward(self, x, t, ctx, cache):
        h = self.hidden(x, t, ctx)
        keys = cache.update(h)
        return self.out((h @ keys.transpose(1, 2)).softmax(-1) @ keys)


@odd(
    "containers",
    loop=giving(text, callback=lambda p: torch.sin if p.index % 2 else torch.cos),
    refused="argument 'callback'",
)
class TakesAFunction(Net):
    """Calls a function that it is given."""

    def forward(self, x, t, ctx, callback):
        return self.out(callback(self.hidden(x, t, ctx)))


@odd("containers", loop=giving(text))
class GivesAnOrderedDict(Net):
    """Answers with a dict of a kind of its own, ordered."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return collections.OrderedDict(sample=self.out(h), hidden=h)


@odd(
    "containers",
    loop=giving(text, lambda p: torch.arange(p.x.shape[1]) % 2 == 0, lambda p: slice(0, 2)),
    refused="argument 'part'",
)
class TakesMasksAndSlices(Net):
    """A mask of booleans and a slice."""

    def forward(self, x, t, ctx, mask, part):
        h = self.hidden(x, t, ctx[:, part])
        return self.out(h.masked_fill(mask[:, None], 0.0))


@odd(
    "containers",
    loop=giving(text, lambda p: {"pair": 1j, "sizes": torch.Size([2, 3]), "any": range(3)}),
    refused="argument 'given",
)
class TakesOddConstants(Net):
    """A complex number, a size and a range among the arguments."""

    def forward(self, x, t, ctx, given):
        scale = given["pair"].imag + given["sizes"][0] + sum(given["any"])
        return super().forward(x, t, ctx) / scale


def of_two_lengths(net: Any, prompt: Prompt, see: See) -> Tensor:
    """An optional argument is given at some steps only."""
    x = prompt.x
    with torch.no_grad():
        for step, value in enumerate(LEVELS):
            more = {"control": prompt.ctx[:, :1, :4]} if step < 2 else {}
            out = net(x, level(x, value), prompt.ctx, **more)
            see(out)
            x = x - 0.1 * out
    return x


@odd("containers", loop=of_two_lengths, by_hand=False, long=True)
class ControlledForAWhile(Net):
    """An argument that is there only for the first steps."""

    def forward(self, x, t, ctx, **more):
        return super().forward(x + more.get("control", 0), t, ctx)
