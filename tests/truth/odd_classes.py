"""Odd modules by how their class is written: calls, forwards, attributes, slots, cycles, wrappers, names."""

from __future__ import annotations

import abc
import functools
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .odd_modules import LEVELS, Net, Prompt, See, level, odd


@odd("classes")
class OwnCall(Net):
    """Its `__call__` does more than its forward."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 2


@odd("classes", by_hand=False, long=True)
class CallThatCounts(Net):
    """Its `__call__` counts, around a compiled module too, which a cache written by hand does not call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return super().__call__(*args, **kwargs)


@odd("classes", refused="replaced forward")
class ForwardOfTheInstance(Net):
    """Its forward was set on the instance."""

    def __init__(self):
        super().__init__()
        plain = self.forward

        def forward(x, t, ctx):
            return plain(x, t, ctx) * 2

        self.forward = forward


@odd("classes")
class AsksItsInside(nn.Module):
    """Whatever it has not itself, it has from the module inside."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.net.scale = 2.0

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)

    def forward(self, x, t, ctx):
        return self.out(self.hidden(x, t, ctx)) * self.scale


@odd("classes", refused="another cache")
class HasEveryAttribute(Net):
    """Makes up an answer for every attribute that it has not."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return 0.5

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx) * self.anything


@odd("classes")
class LogsWhatIsSet(Net):
    """Writes down every attribute that is set on it."""

    def __init__(self):
        object.__setattr__(self, "log", [])
        super().__init__()
        self.log.clear()

    def __setattr__(self, name, value):
        self.log.append(name)
        super().__setattr__(name, value)

    def forward(self, x, t, ctx):
        self.step = len(x)
        return super().forward(x, t, ctx)


@odd("classes", uncacheable=True)
class PropertyThatCounts(Net):
    """A property counts how often it is read, and the answer depends on it."""

    def __init__(self):
        super().__init__()
        self._reads = 0

    @property
    def scale(self):
        self._reads += 1
        return 1 / self._reads

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx) * self.scale


@odd("classes")
class Slots(Net):
    """Keeps something in a slot, which is in no dictionary."""

    __slots__ = ("calls",)

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "calls", 0)

    def forward(self, x, t, ctx):
        object.__setattr__(self, "calls", self.calls + 1)
        return super().forward(x, t, ctx)


@odd("classes", uncacheable=True)
class CountsInASlot(Net):
    """The counter in the slot changes the answer."""

    __slots__ = ("calls",)

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "calls", 0)

    def forward(self, x, t, ctx):
        object.__setattr__(self, "calls", self.calls + 1)
        return super().forward(x, t, ctx) / self.calls


@odd("classes")
class SharedTwice(Net):
    """One layer under two names, and three times in a list."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.again = self.mix
        self.blocks = nn.ModuleList([self.mix] * 3)

    def forward(self, x, t, ctx):
        h = self.again(self.hidden(x, t, ctx))
        for block in self.blocks:
            h = h + block(h).tanh()
        return self.out(h)


class Child(nn.Module):
    """A part that knows its owner, whose layer it uses."""

    def __init__(self, owner):
        super().__init__()
        self.owner, self.calls = [owner], 0

    def forward(self, h):
        self.calls += 1
        return self.owner[0].out(h)


@odd("classes")
class KnowsItsOwner(Net):
    """A part has a reference to the whole."""

    def __init__(self):
        super().__init__()
        self.child = Child(self)

    def forward(self, x, t, ctx):
        return self.child(self.hidden(x, t, ctx))


@odd("classes", refused="by position only")
class Wrapped(nn.Module):
    """A wrapper such as for data parallelism: the denoiser is its `module`, its forward takes anything."""

    def __init__(self):
        super().__init__()
        self.module = Net()

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@odd("classes", refused="by position only")
class TakesAnything(Net):
    """A forward of `*args` alone."""

    def forward(self, *args):
        x, t, ctx = args
        return super().forward(x, t, ctx)


def by_name(net: Any, prompt: Prompt, see: See) -> Tensor:
    """A loop that gives all arguments by name, in another order."""
    x = prompt.x
    with torch.no_grad():
        for value in LEVELS:
            out = net(ctx=prompt.ctx, t=level(x, value), x=x)
            see(out)
            x = x - 0.1 * out
    return x


@odd("classes", loop=by_name)
class TakesAnyNames(Net):
    """A forward of `**kwargs` alone."""

    def forward(self, **kwargs):
        return super().forward(kwargs["x"], kwargs["t"], kwargs["ctx"])


@odd("classes", refused="by position only")
class PositionalOnly(Net):
    """A forward whose arguments have no names."""

    def forward(self, x, t, ctx, /):
        return super().forward(x, t, ctx)


@odd("classes", refused="by position only")
class RestOfTheTexts(Net):
    """The texts are the rest of the positions."""

    def forward(self, x, t, *texts):
        return super().forward(x, t, torch.cat(texts, 1))


def twice(forward):
    """A decorator as people write them."""

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        return forward(*args, **kwargs) * 2

    return wrapped


@odd("classes")
class DecoratedForward(Net):
    """Its forward is wrapped by a decorator."""

    @twice
    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx)


@odd("classes", long=True, by_hand=False)
class PartialForward(Net):
    """Its forward is a partial method."""

    def scaled(self, x, t, ctx, scale):
        return super().forward(x, t, ctx) * scale

    forward = functools.partialmethod(scaled, scale=0.5)


@odd("classes")
class LooksEmpty(nn.Sequential):
    """A container of length zero, so that it is false, with layers of another kind."""

    def __init__(self):
        super().__init__()
        self.__dict__["inner"] = Net()

    def __len__(self):
        return 0

    def forward(self, x, t, ctx):
        return self.inner(x, t, ctx)


@odd("classes")
class EqualsAll(Net):
    """Equal to every other module, as a dataclass without fields is."""

    def __eq__(self, other):
        return isinstance(other, nn.Module)

    def __hash__(self):
        return 7


@odd("classes")
class CannotBeCopied(Net):
    """Refuses to be copied or pickled."""

    def __deepcopy__(self, memo):
        raise TypeError("this module cannot be copied")

    def __reduce_ex__(self, protocol):
        raise TypeError("this module cannot be pickled")


@odd("classes")
class NamesOfOurs(Net):
    """Has attributes that are called as those of a compiled module."""

    def __init__(self):
        super().__init__()
        self.plan, self.session, self.calls = "a plan of its own", 3.0, 0

    def summary(self):
        return "a summary of its own"

    def compile(self):
        return "compiles itself"

    def forward(self, x, t, ctx):
        self.calls += 1
        return super().forward(x, t, ctx) * self.session


@odd("classes")
class OwnState(Net):
    """Has a `__getstate__` of its own, which leaves out what it remembers."""

    def __init__(self):
        super().__init__()
        self.remembered = {}

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "remembered"}

    def forward(self, x, t, ctx):
        self.remembered["last"] = x
        return super().forward(x, t, ctx)


Kind = TypeVar("Kind")


class Abstract(Net, abc.ABC, Generic[Kind]):
    """A generic class with an abstract method."""

    @abc.abstractmethod
    def scale(self) -> float: ...


@odd("classes")
class Concrete(Abstract[int]):
    """What is made of it."""

    def scale(self):
        return 3.0

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx) * self.scale()


@odd("classes")
class HidesItsParts(Net):
    """Shows neither its parameters nor its parts."""

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        yield prefix, self

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        yield from ()
