"""Malformed and hostile files of every kind that dcc reads: each is refused in dcc's own words, or does no harm.

No code of theirs runs (a canary would show it), none of them takes long, and none waits for anything.
"""

import json
import math
import warnings
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dcc.capture import store
from dcc.capture.export import capture
from dcc.capture.graph_file import FORMAT, MARK, read_graph, write_graph
from dcc.capture.purity import examine
from dcc.cli import _lines
from dcc.errors import CaptureError, DccError, PlanError, PolicyError, ProfileError, PromptError
from dcc.measure import calibrate
from dcc.measure.calibrate import Accumulated, probe_steps
from dcc.measure.profile import VERSION as PROFILE_VERSION
from dcc.measure.profile import Profile, SiteCost
from dcc.plans.plan import Plan, make_plan
from dcc.plans.predictors import Predictor
from dcc.plans.triggers import Memory
from dcc.policies.base import read_table
from dcc.record.call import bind
from dcc.variants import correctors

from .hostile import changed, code, damaged, header_of, no_files, outcome, quickly, rewrite
from .test_profile import synthetic
from .test_triggers import EXAMPLES

COPY = Predictor("copy")
FORMS = {
    "bands": {"transform": "dct", "cutoff": 0.1, "grid": [4, 6], "predictors": [COPY.as_json()] * 2},
    "clusters": {"of_channel": [0, 0, 1], "predictors": [COPY.as_json()] * 2},
    "tokens": {"select": "norm", "ratio": [0.5, 0.25], "sign": 1, "age": 0.1},
    "corrector": {"kind": "low_rank", "rank": 4, "channels": None},
}


@pytest.fixture
def canary(tmp_path):
    """A path at which a file would be if any code of a file had run."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def a_plan(**changes):
    facts = {
        "model": "m", "scheduler": "s", "levels": (3.0, 2.0, 1.0), "sites": ["h"], "schedule": [[1], [1], [0]],
        "predictors": [Predictor("hermite", 1, (("sigma", 0.5),))], "policy": "test",
        "parameters": {"interval": [1, "x"]},
    }  # fmt: skip
    made = make_plan(**facts | changes)
    measured = {"prompts": 2, "psnr_mean": 30.0, "psnr_worst": 20.0, "fewer_steps": 3, "fewer_steps_psnr": 1.0}
    return replace(made, measured={} if made.trigger else measured, limits=(0.5,) * 3)


def triggered(trigger):
    sites = [f"site {index}" for index in range(len(trigger.sample_row(1)))]
    changes = {
        "sites": sites,
        "schedule": [[1] * len(sites)] + [[0] * len(sites)] * 2,
        "predictors": [COPY] * len(sites),
    }
    return a_plan(trigger=trigger, **changes)


PLANS = {
    "plain": a_plan(),
    **{name: a_plan(forms=[{name: form}]) for name, form in FORMS.items()},
    **{f"trigger {trigger.kind}": triggered(trigger) for trigger in EXAMPLES},
}


def use_plan(plan, path):
    """What a plan is used for without a denoiser: it is shown, saved, and its trigger decides over a run."""
    assert str(plan)
    plan.save(path)
    assert Plan.load(path).as_json() == plan.as_json() or "NaN" in path.read_text()
    for step in range(plan.steps):
        assert len(plan.anchor_steps(step, 0)) <= plan.anchors and len(plan.weights(step, 0)) == plan.parts(0)
    if plan.trigger is None:
        return
    memory = Memory(plan.steps)
    for step in range(plan.steps):
        values = {measure.name: 0.1 * step for measure in plan.trigger.measures}
        decided = step == 0 or plan.trigger.decide(memory, step, values)
        plan.trigger.weights(memory, step, values)
        plan.trigger.observe(memory, step, decided is True, values if step else {})
        assert decided in (True, False) or len(decided) == len(plan.sites)
    for predictor in plan.predictors:
        try:
            predictor.coefficients(2, [1, 0])
        except PolicyError as error:
            assert "finite coefficients" in str(error)


@pytest.mark.parametrize("name", PLANS)
def test_plans_with_one_value_changed(name, canary, tmp_path):
    path, tried = tmp_path / "plan.json", count()
    PLANS[name].save(path)
    data = json.loads(path.read_text())
    for edit, other in changed(data, canary, 80):
        path.write_text(json.dumps(other))
        plan = outcome(edit, lambda: Plan.load(path), PlanError)
        if plan is not None:
            outcome(edit, lambda plan=plan: use_plan(plan, path), PlanError)
        next(tried)
    assert next(tried) == 80


@pytest.mark.parametrize("text", ['"model": "a", "model": "b"', '"levels": [1], "levels": [2]'])
def test_a_name_that_stands_twice(text, tmp_path):
    (tmp_path / "plan.json").write_text('{"dcc_plan": 1, ' + text + "}")
    with pytest.raises(PlanError, match=r"plan\.json: .*stands twice"):
        Plan.load(tmp_path / "plan.json")


def a_profile():
    torch.manual_seed(0)
    return synthetic(torch.randn(2, 3, 6, 10), streams=("cond", "uncond"))


def use_profile(profile):
    assert str(profile.costs) and profile.error(profile.default, 3, [2, 1], [2.0, -1.0]) >= 0
    assert profile.similarity(profile.default).isfinite().all()


def test_profiles_with_one_value_changed(canary, tmp_path):
    path, tried = tmp_path / "p.safetensors", count()
    a_profile().save(path)
    for edit, header in changed(header_of(path), canary, 200):
        a_profile().save(path)
        rewrite(path, "dcc_profile", PROFILE_VERSION, header)
        profile = outcome(edit, lambda: Profile.load(path), ProfileError)
        if profile is not None:
            use_profile(profile)
        next(tried)
    assert next(tried) == 200


def a_checkpoint(path, done=1):
    """A checkpoint of one of two prompts, as a calibration writes it."""
    steps, sites = 4, ["output", "stack"]
    identity = {
        "model": "0" * 16, "dtype": "float32", "weights": "1" * 16, "scheduler": "S", "levels": [4.0, 3.0, 2.0, 1.0],
        "sites": sites, "settings": {}, "seed": 0, "prompts": "2 prompts, 00",
    }  # fmt: skip
    state = Accumulated(identity)
    state.done, state.streams, state.seconds = done, ["cond"], 0.5
    state.costs = [SiteCost(name, "residual", 10, 10, 0.1) for name in sites]
    probes = probe_steps(steps, 2)
    state.probes = [(step, 1.0) for p, step in enumerate(probes) if p * 2 // len(probes) < done]
    state.gram = torch.zeros(1, 2, steps, steps, dtype=torch.float64)
    state.moved, state.size = torch.zeros(2, 1, 2, steps, dtype=torch.float64)
    state.save(path)
    return Accumulated(identity)


def test_checkpoints_with_one_value_changed(canary, tmp_path):
    path, tried = tmp_path / "half.ckpt", count()
    a_checkpoint(path).load(path, 2)
    header = header_of(path)
    for edit, other in changed(header, canary, 200):
        fresh = a_checkpoint(path)
        rewrite(path, calibrate.MARK, calibrate.VERSION, other)
        outcome(edit, lambda fresh=fresh: fresh.load(path, 2), ProfileError)
        assert fresh.done in (0, 1)  # prompts that were run, or nothing at all
        next(tried)
    assert next(tried) == 200
    for done in (0, 2, 99, -1, True, 1.0, 2**70):  # 2 has too few probes
        fresh = a_checkpoint(path)
        rewrite(path, calibrate.MARK, calibrate.VERSION, header | {"done": done})
        with pytest.raises(ProfileError, match=r"half\.ckpt: this checkpoint is malformed: field '(done|probes)'"):
            fresh.load(path, 2)


@pytest.mark.parametrize("kind", ["profile", "checkpoint"])
def test_tensors_of_other_shapes_dtypes_and_values(kind, canary, tmp_path):
    path = tmp_path / "file"
    mark, version = ("dcc_profile", PROFILE_VERSION) if kind == "profile" else (calibrate.MARK, calibrate.VERSION)
    fresh = a_checkpoint(path)
    if kind == "profile":
        a_profile().save(path)
    header = header_of(path)
    from safetensors.torch import load_file  # the tensors alone

    good = load_file(path)
    others = [
        torch.tensor(1.0), torch.empty(0), torch.zeros(0, 0, 21, dtype=torch.float64), torch.zeros(1, dtype=torch.bool),
        torch.zeros(2, dtype=torch.bfloat16), torch.full((2, 3, 21), math.nan, dtype=torch.float64),
    ]  # fmt: skip
    for name in good:
        for other in [*others, good[name].float().half(), good[name] * math.inf, good[name][..., :1], None]:
            tensors = good | {name: other, "more": torch.ones(1)} if other is None else good | {name: other}
            save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, path)
            rewrite(path, mark, version, header)
            load = (lambda: Profile.load(path)) if kind == "profile" else (lambda: fresh.load(path, 2))
            assert outcome(f"{name}: {other}", load, ProfileError) is None and fresh.done == 0


def test_levels_without_end_take_no_memory(tmp_path):
    """A hundred thousand levels would be a Gram matrix of 80 GB; the file says so in a few letters."""
    path = tmp_path / "p.safetensors"
    a_profile().save(path)
    header = header_of(path) | {"levels": [1.0] * 100_000, "streams": [], "costs": []}
    save_file(
        {
            "gram": torch.zeros(0, 0, 5_000_050_000, dtype=torch.float64),
            "neighbours": torch.zeros(1),
            "sensitivity": torch.zeros(1),
        },
        path,
    )
    rewrite(path, "dcc_profile", PROFILE_VERSION, header)
    assert outcome("levels", lambda: Profile.load(path), ProfileError) is None


class Net(nn.Module):
    """Symbolic sizes, a constant, a list of outputs and a weight."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, time):
        first, last = self.linear(x).chunk(2, dim=-1)
        half = x.shape[1] // 2 + 1
        return torch.cat([first, last], 1)[:, :half] * torch.tensor([0.5, 2.0]) + time[:, None, None]


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A stored graph: its bytes, its module and a call."""
    torch.manual_seed(0)
    module = Net().eval().requires_grad_(False)
    call = bind(module, (torch.randn(2, 6, 4), torch.rand(2)), {}, frozenset())
    captured = capture(module, call)
    path = tmp_path_factory.mktemp("graph") / "net.graph"
    assert store.write(store.Place(path), captured) == ""
    assert store.read(store.Place(path), module, call, examine(module, call).answers)[0] is not None
    return path.read_bytes(), module, call


def read_stored(name, path, graph):
    """Reads a stored graph in the two ways: with its errors, and as a capture does, which none may fail."""
    _, module, call = graph
    if outcome(name, lambda: read_graph(path), CaptureError) is not None:
        with quickly(name):
            found, why = store.read(store.Place(path), module, call, examine(module, call).answers)
        assert (found is None) == bool(why), name
        if found is not None:
            expected = module(**call.arguments())
            assert torch.equal(found.graph_module(*found.inputs_of(call))[0], expected), name


def test_graphs_with_one_value_changed(graph, canary, tmp_path):
    path, tried = tmp_path / "net.graph", count()
    path.write_bytes(graph[0])
    for edit, header in changed(header_of(path), canary, 150):
        path.write_bytes(graph[0])
        rewrite(path, MARK, FORMAT, header)
        read_stored(edit, path, graph)
        next(tried)
    assert next(tried) == 150


def attacks(header, canary):
    """Headers that would run code, read a file or compute for hours in a reader that trusted them."""
    run = code(canary)
    calls = [index for index, node in enumerate(header["nodes"]) if node[0] == "call_function"]
    first = calls[0]

    def node(index, **fields):
        names = ("op", "name", "target", "args", "kwargs", "value", "at")
        nodes = json.loads(json.dumps(header["nodes"]))
        nodes[index] = [fields.get(name, old) for name, old in zip(names, nodes[index], strict=True)]
        return header | {"nodes": nodes}

    for text in (
        run,
        f"x\n    {run}\n    y",
        f"x, y={run}",
        f"x: {run}",
        "x;y",
        "x y",
        "",
        "lambda",
        "1x",
        "x" * 10**6,
        "é",
    ):
        for op in ("name", "target"):
            yield node(0, **{op: text})
        yield node(first, name=text)
        yield node(first, kwargs={text: 1})
        yield node(first, kwargs={f"a=1); {text}; (": 1})
    for target in (
        "builtins.eval", "builtins:eval", "builtins.exec", "os.system", "posix.system", "_operator.attrgetter",
        "operator.attrgetter", "operator.methodcaller", "_operator:methodcaller", "torch.load", "torch.hub.load",
        "aten.from_file.default", "aten.save.default", "aten.add_.Tensor", "aten.add.out", "aten.add.__class__",
        "aten.__class__.default", "aten.add.Tensor.__call__", "aten.linear", "aten..default", "prim.device.default",
        "profiler._record_function_enter.default", "inductor.resize_storage_bytes_.default", "torch.sym_int.x", run,
        ["aten", "linear", "default"], {"aten": 1}, 5, None,
    ):  # fmt: skip
        yield node(first, target=target)
        yield node(first, target=target, args=[str(canary), True, 10], kwargs={})
    for op in ("call_module", "call_method", "get_attr", "placeholder", "output", "root", run):
        yield node(first, op=op)
        yield node(first, op=op, target="__class__")
        yield node(first, op=op, target="forward", args=[])
    for argument in (
        {"dtype": run}, {"dtype": "load"}, {"layout": "os"}, {"memory_format": "hub"}, {"device": run},
        {"device": "cuda:99"},
        {"eval": run}, {"node": -1}, {"node": 10**9}, {"node": first + 1}, {"node": run}, {"tuple": run}, {"tuple": 5},
        {"slice": [0, 1, 2]}, {"node": 0, "tuple": []}, {}, 10**4000, [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]],
    ):  # fmt: skip
        yield node(first, args=[argument])
        yield node(first, kwargs={"bias": argument})
    for size in (
        run, "s0", ["eval", run], ["Pow", 10, 10**9], ["PowByNatural", ["PowByNatural", 9, 60], 60],
        ["Mul", *[2**40] * 50],
        ["Add", *[1] * 10**5], {"size": 10**9}, {"size": run},
    ):  # fmt: skip
        yield header | {"sizes": [["int", size]] * len(header["sizes"])}
        yield header | {"values": [{"number": size}] * len(header["values"])}
        yield header | {"values": [{"tensor": ["float32", "cpu", [size], [1]]}] * len(header["values"])}
    for outputs in (
        run, {"tuple": [run]}, {"class": ["os.system", {run: 0}]}, {"class": ["collections.namedtuple", {"a": 0}]},
        {"tuple": [{"__enum__": True, "fqn": "os:system", "name": run}]}, [1, {"type": "builtins.tuple"}],
    ):  # fmt: skip
        yield header | {"facts": header["facts"] | {"outputs": outputs}}
    for weight in (run, "__class__.__name__", "linear.__class__", "forward", "linear", "linear.weight.data", "..", ""):
        yield header | {"facts": header["facts"] | {"weights": dict.fromkeys(header["facts"]["weights"], weight)}}
        yield header | {"facts": header["facts"] | {"inputs": dict.fromkeys([weight], "x")}}
    chain = [
        ["call_function", f"p{n}", "operator.mul", [{"node": len(header["nodes"]) - 2 + n}] * 2, {}, None, 0]
        for n in range(60)
    ]
    yield header | {"nodes": [*header["nodes"][:-1], *chain, header["nodes"][-1]]}
    yield header | {"nodes": header["nodes"][:1] * 100_000}
    yield header | {"values": header["values"][:1] * 100_000}


def test_graphs_that_would_run_code_or_never_end(graph, canary, tmp_path):
    eval(code(canary))  # what the files hold does make the canary, where anything evaluates it
    assert canary.exists()
    canary.unlink()
    path, tried = tmp_path / "net.graph", count()
    path.write_bytes(graph[0])
    for header in attacks(header_of(path), canary):
        path.write_bytes(graph[0])
        rewrite(path, MARK, FORMAT, header)
        read_stored(f"attack {next(tried)}", path, graph)
    assert next(tried) > 200


def test_a_header_that_was_changed_alone_is_refused(graph, canary, tmp_path):
    """The checksum covers the header, so that a change of one letter is found in every kind of file."""
    paths = {"net.graph": MARK, "p.safetensors": "dcc_profile", "half.ckpt": calibrate.MARK}
    (tmp_path / "net.graph").write_bytes(graph[0])
    a_profile().save(tmp_path / "p.safetensors")
    fresh = a_checkpoint(tmp_path / "half.ckpt")
    loads = {"net.graph": read_graph, "p.safetensors": Profile.load, "half.ckpt": lambda path: fresh.load(path, 2)}
    for name, mark in paths.items():
        data = (tmp_path / name).read_bytes()
        for old, new in ((b"0", b"9"), (b"s", b"t"), (b" ", b"_")):
            place = data.index(old, data.index(b'"header":"') + 10)
            (tmp_path / name).write_bytes(data[:place] + new + data[place + 1 :])
            with pytest.raises(DccError, match=rf"{name}: .*(checksum|JSON|missing)"):
                loads[name](tmp_path / name)
        assert mark.encode() in data


LOADS = {
    "plan": (Plan.load, PlanError),
    "profile": (Profile.load, ProfileError),
    "checkpoint": (lambda path: Accumulated({"levels": [], "sites": []}).load(path, 2), ProfileError),
    "graph": (read_graph, CaptureError),
    "table.json": (lambda path: read_table(str(path)), PolicyError),
    "table.safetensors": (lambda path: read_table(f"{path}"), PolicyError),
    "maps": (lambda path: correctors._tensors(str(path), ["a"]), PlanError),
    "prompts": (_lines, PromptError),
}


def written(kind, path, graph):
    """A valid file of a kind."""
    if kind == "plan":
        a_plan().save(path)
    elif kind == "profile":
        a_profile().save(path)
    elif kind == "checkpoint":
        a_checkpoint(path)
    elif kind == "graph":
        path.write_bytes(graph[0])
    elif kind == "prompts":
        path.write_text("a red circle\na blue square\n")
    elif kind == "table.json":
        path.write_text("[[1, 0], [0, 1]]")
    else:
        save_file({"a": torch.ones(2, 2)}, path)


@pytest.mark.parametrize("kind", LOADS)
def test_damaged_files_and_what_is_no_file(kind, graph, canary, tmp_path):
    load, refused = LOADS[kind]
    path = tmp_path / ("file.safetensors" if kind == "table.safetensors" else "file")
    written(kind, path, graph)
    good = path.read_bytes()
    for name, data in damaged(good):
        path.write_bytes(data)
        outcome(f"{kind}: {name}", lambda: load(path), refused)
    other = tmp_path / "other"
    other.mkdir()
    for name, where in no_files(other):
        if name not in ("/dev/null",):
            assert not outcome(f"{kind}: {name}", lambda where=where: load(where), refused), name


def test_values_of_a_table(tmp_path):
    path = tmp_path / "table.json"
    for name, value in changed([[1, 0], [0, 1]], tmp_path / "canary", 80):
        path.write_text(json.dumps(value))
        rows = outcome(name, lambda: read_table(str(path)), PolicyError)
        assert rows is None or all(math.isfinite(number) for row in rows for number in row)


def test_maps_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "maps.safetensors"
    for tensor in (torch.tensor([math.nan]), torch.tensor([math.inf, 1.0]), torch.ones(2, dtype=torch.int32)):
        save_file({"a": tensor}, path)
        with pytest.raises(PlanError, match=r"maps\.safetensors: the tensor 'a' holds"):
            correctors._tensors(str(path), ["a"])


def test_a_graph_that_cannot_be_read_again_is_not_written(tmp_path):
    made = torch.fx.Graph()
    x = made.placeholder("x")
    made.output((made.call_function(torch.ops.aten.add.Tensor, (x, 2**80)),))
    with warnings.catch_warnings(), pytest.raises(CaptureError, match="beyond 64 bits"):
        write_graph(tmp_path / "graph", made, {}, {})
    assert not list(Path(tmp_path).iterdir())
