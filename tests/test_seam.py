"""The one seam: what is compiled stays the object and class that it was, and the handler is reached by every call."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

import dcc
from dcc.errors import AlreadyCompiledError, PipelineError
from dcc.record import seam

from .nets import Net, sample


class Answer(seam.Handler):
    """Says what it was called with, and answers with the original's value plus a number."""

    def __init__(self, module: nn.Module, plus: float = 100.0) -> None:
        super().__init__(module)
        self.plus, self.calls = plus, 0

    def call(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs) + self.plus

    def entries(self):
        return {"answers": True}


X, TIME = torch.zeros(1, 2), torch.ones(1)


@pytest.fixture
def net():
    return Net().eval()


@pytest.fixture
def handler(net):
    handler = Answer(net)
    seam.install(net, handler)
    return handler


def plain(value: Tensor) -> bool:
    return bool(value.detach().eq(1).all())


def handled(value: Tensor) -> bool:
    return bool(value.detach().eq(101).all())


def test_the_module_is_the_same_object_and_class(net, handler):
    assert type(net) is Net and isinstance(net, Net) and net.answers
    assert list(net.state_dict()) == ["weight"] == [name for name, _ in net.named_parameters()]
    assert handled(net(X, TIME)) and handler.calls == 1


def test_a_direct_call_of_forward_is_served_too(net, handler):
    assert handled(net.forward(X, TIME)) and handler.calls == 1


def test_removing_leaves_the_module_as_it_was(net):
    vars(net)["cache_context"] = mark = object()
    before = dict(vars(net))
    seam.install(net, Answer(net))
    assert vars(net) != before
    seam.remove(net)
    assert vars(net) == before and net.cache_context is mark
    assert seam.remove(net) is None


def test_what_was_replaced_since_stays(net, handler):
    def patched(x, time):
        return x

    net.forward = patched
    seam.remove(net)
    assert net.forward is patched and seam.handler_of(net) is None


def test_the_last_handler_serves_and_the_one_before_comes_back(net, handler):
    with seam.installed(net, Answer(net, 7.0)):
        assert net(X, TIME).eq(8).all()
        with seam.installed(net, None):
            assert plain(net(X, TIME))
    assert handled(net(X, TIME))


def test_an_exception_leaves_the_handler_that_was_there(net, handler):
    with pytest.raises(RuntimeError, match="inside"), seam.installed(net, Answer(net, 7.0)):
        raise RuntimeError("inside")
    assert seam.handler_of(net) is handler and handled(net(X, TIME))


def test_disabled_is_for_this_thread_only(net, handler):
    seen = []
    with seam.disabled(net):
        assert plain(net(X, TIME)) and plain(net.forward(X, TIME))
        other = threading.Thread(target=lambda: seen.append(net(X, TIME)))
        other.start()
        other.join()
    assert handled(seen[0]) and handled(net(X, TIME))


def test_hooks_of_the_module_run_where_the_original_does(net, handler):
    """A hook on the module belongs to the original: it runs when that runs, and not for a forecast."""
    seen = []
    net.register_forward_pre_hook(lambda *_: seen.append("hook"))
    net(X, TIME)
    assert seen == ["hook"] and handler.calls == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), copy.copy])
def test_copies_and_pickles_are_of_the_plain_module(net, handler, copied):
    net.weight.data += 1
    twin = copied(net)
    assert type(twin) is Net and seam.handler_of(twin) is None
    assert {"forward", "_compiled_call_impl", "_dcc", "cache_context", "answers"}.isdisjoint(vars(twin))
    assert twin(X, TIME).eq(2).all() and handled(net(X, TIME) - 1)


def test_torch_save_keeps_the_plain_module(net, handler):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    assert plain(torch.load(file, weights_only=False)(X, TIME))


def test_module_compile_is_refused(net, handler):
    with pytest.raises(AlreadyCompiledError, match=r"Net.compile\(\) would take the place of what dcc compiled"):
        net.compile()
    assert handled(net(X, TIME))
    seam.remove(net)
    net.compile(backend="eager")  # the original's own, which is nobody's business any more
    assert plain(net(X, TIME))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["handler", "torch.compile"])
@torch.no_grad()
def test_torch_compile_on_top_is_served(net, first):
    """Dynamo breaks its graph at the handler, whichever of the two came first, on the module and in code that calls it.

    The function around it has code of its own, so that Dynamo traces something.
    """
    torch._dynamo.reset()
    handler = Answer(net)
    if first == "handler":
        seam.install(net, handler)
    on_top = torch.compile(net, backend="eager")
    nested = torch.compile(lambda x, time: net(x + 1, time) * 3, backend="eager")
    if first == "torch.compile":
        assert plain(on_top(X, TIME)) and nested(X, TIME).eq(9).all()
        seam.install(net, handler)
    assert handled(on_top(X, TIME)) and handler.calls == 1
    assert nested(X, TIME).eq(309).all() and handler.calls == 2
    with seam.disabled(net):
        assert plain(on_top(X, TIME)) and nested(X, TIME).eq(9).all()
    seam.remove(net)
    assert plain(on_top(X, TIME)) and handler.calls == 2


def test_cache_context_nests_and_is_for_one_module(net, handler):
    with net.cache_context("cond", step_index=3, num_inference_steps=9, unknown=1):
        assert handler.position == seam.Position("cond", 3, 9)
        with net.cache_context("uncond"):
            assert handler.position == seam.Position("uncond")
        assert handler.position.name == "cond"
        assert Answer(Net()).position is None
    assert handler.position is None


def test_the_module_s_own_cache_context_is_entered_too(net):
    import contextlib

    entered = []

    @contextlib.contextmanager
    def own(name, **fields):
        entered.append(name)
        yield
        entered.append("left")

    net.cache_context = own
    handler = Answer(net)
    seam.install(net, handler)
    with net.cache_context("cond"):
        assert entered == ["cond"] and handler.position.name == "cond"
    assert entered == ["cond", "left"]


def test_a_bare_module_is_compiled_in_place(net):
    before, expected = dict(vars(net)), sample(net, 1)
    compiled = dcc.compile(net, [1], sample=sample, policy="interval", interval=2, backend="eager")
    assert compiled is net and type(net) is Net
    cached = sample(net, 1)
    assert not torch.equal(cached, expected)
    counts = dcc.compiled(net).sessions.counts
    assert (counts.computed, counts.forecast) == (2, 2)
    with dcc.disabled(net):
        assert torch.equal(sample(net, 1), expected)
    assert torch.equal(sample(net, 1), cached)
    assert "2 computed" in " ".join(str(dcc.summary(net)).split()) or counts.computed == 4
    with pytest.raises(AlreadyCompiledError, match="compiled by dcc already"):
        dcc.compile(net, [1], sample=sample, policy="interval", backend="eager")
    assert dcc.restore(net) is net and vars(net) == before and torch.equal(sample(net, 1), expected)
    for ask in (dcc.compiled, dcc.summary, dcc.restore):
        with pytest.raises(PipelineError, match="not compiled"):
            ask(net)


def test_a_refused_compile_leaves_no_trace(net):
    before = dict(vars(net))
    with pytest.raises(dcc.errors.DccError):
        dcc.compile(net, [1], sample=sample, policy="teacache", site="nowhere", backend="eager")
    assert vars(net) == before
