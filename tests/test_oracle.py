"""For random plans the rewritten graph equals the oracle: the eager module with hooks that store and replace values."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcc.errors import PassError
from dcc.plans.plan import Plan
from dcc.plans.predictors import Predictor

from . import tiny
from .oracle import GROUPS, SITES, Cached, History, Oracle, taps

pytestmark = pytest.mark.usefixtures("graphs")

MODELS = tuple(SITES)
ALL_COMPUTE = [[1]] * tiny.STEPS
# The oracle forecasts in float64, dcc in float32 with coefficients of at most about 50 (Newton, order 2, four steps
# ahead); with seven steps of a network of float32 after them, 1e-4 of the output's scale leaves room for rounding only.
TOLERANCE = 1e-4

PREDICTORS = st.sampled_from(
    [Predictor("copy"), *(Predictor(name, order) for name in ("taylor", "newton") for order in (1, 2))]
)


@dataclass(frozen=True)
class Draft:
    """A random plan as its parts."""

    selectors: tuple[str, ...]
    schedule: tuple[tuple[int, ...], ...]
    predictors: tuple[Predictor, ...]

    def plan(self, model: str) -> Plan:
        return tiny.plan(model, self.selectors, self.schedule, self.predictors)

    def oracle(self, model: str) -> Oracle:
        """The oracle of the plan, inner sites first, as `SITES` lists them; groups are of inner sites."""
        known = list(SITES[model])
        order = sorted(range(len(self.selectors)), key=lambda k: [*GROUPS, *known].index(self.selectors[k]))
        return Oracle(
            tiny.module(model),
            [
                Cached(
                    taps(model, self.selectors[k]),
                    tuple(row[k] for row in self.schedule),
                    self.predictors[k].name,
                    self.predictors[k].order,
                )
                for k in order
            ],
        )


def selectors_of(model: str) -> list[str]:
    """Every site and group of the model; groups only where all their sites are written down."""
    groups = [] if model == "unet-sd" else [name for name in GROUPS]
    return [*SITES[model], *groups, *(["blocks"] if model == "unet-sd" else [])]


def overlap(model: str, names: tuple[str, ...]) -> bool:
    """Whether two of the selectors cache the same value."""
    made = [tap.out for name in names for tap in taps(model, name)]
    return len(made) != len(set(made))


def drafts(model: str) -> st.SearchStrategy[Draft]:
    """Plans of up to three selectors and four distinct rows (each row of a plan costs a variant)."""

    @st.composite
    def draw_draft(draw: st.DrawFn) -> Draft:
        names = draw(st.lists(st.sampled_from(selectors_of(model)), min_size=1, max_size=3, unique=True).map(tuple))
        assume(not overlap(model, names))
        width = len(names)
        palette = draw(st.lists(st.tuples(*[st.integers(0, 1)] * width), min_size=1, max_size=3, unique=True))
        assume(not all(all(row) for row in palette))
        rows = draw(st.lists(st.sampled_from(palette), min_size=tiny.STEPS - 1, max_size=tiny.STEPS - 1))
        return Draft(names, ((1,) * width, *rows), draw(st.tuples(*[PREDICTORS] * width)))

    return draw_draft()


def check(model: str, draft: Draft) -> None:
    """Runs one generation both ways; compares every output, the final sample and the number of forecasts."""
    plan = draft.plan(model)
    net, oracle, history = tiny.compiled(model, plan), draft.oracle(model), History()
    ours = tiny.generate(model, tiny.denoise_with(net), 3)
    theirs = tiny.generate(model, lambda step, kwargs: oracle(history, step, kwargs), 3)
    for step, ((output, sample), (expected, expected_sample)) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(output, expected, f"output of step {step}")
        assert_close(sample, expected_sample, f"sample after step {step}")
    counts = net.sessions.counts
    full = sum(all(row) for row in draft.schedule)
    assert (counts.computed, counts.forecast, counts.missed) == (full, tiny.STEPS - full, 0)
    assert counts.sessions == 1
    assert not net.sessions.streams


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE, f"{what} differs from the oracle's by {error:.1e} of its largest value"


@pytest.mark.parametrize("model", MODELS)
@settings(
    derandomize=True,
    max_examples=15,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_random_plans_equal_the_oracle(model: str, data: st.DataObject) -> None:
    check(model, data.draw(drafts(model)))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("flux", ("hidden", "transformer_blocks", "transformer_blocks.0/attn.1")),
        ("flux", ("branches",)),
        ("flux", ("stack", "blocks[1:3]", "single_transformer_blocks.2/attn+mlp")),
        ("pixart", ("stack", "transformer_blocks.1/cross", "output")),
        ("pixart", ("mlp", "attn")),
        ("unet-sd", ("cut:1", "down_blocks.0", "hidden")),
        ("unet-sd", ("down_blocks", "blocks[2:5]", "up_blocks.0")),
    ],
)
def test_nested_sites_with_masks_of_their_own(model: str, names: tuple[str, ...]) -> None:
    """A forecast inside a computed site is part of that site's value, and a computed site inside a forecast is true."""
    masks = ((1, 1, 0, 0, 1, 0, 0), (1, 0, 1, 0, 1, 1, 0), (1, 1, 1, 0, 0, 1, 1))[: len(names)]
    rules = (Predictor("taylor", 2), Predictor("newton", 2), Predictor("copy"))[: len(names)]
    check(model, Draft(names, tuple(zip(*masks, strict=True)), rules))


@pytest.mark.parametrize("inner", ["single_transformer_blocks.2", "single_transformer_blocks"])
def test_a_computed_block_that_ends_a_forecast_stack_keeps_its_true_value(inner: str) -> None:
    """Both sites end in the same value: the block's anchor must come from the block, not from the stack's forecast."""
    draft = Draft((inner, "stack"), ((1, 1), (1, 0), (1, 0), (0, 1), (0, 1), (1, 1), (0, 1)), (tiny.COPY, tiny.COPY))
    check("flux", draft)


@pytest.mark.parametrize("names", [("single_transformer_blocks", "stack"), ("stack", "single_transformer_blocks")])
def test_two_forecasts_of_one_value_are_refused(names: tuple[str, ...]) -> None:
    """Whichever is named first: serving one of them only would be a silent no-op of the other."""
    plan = tiny.plan("flux", names, [(1, 1), (0, 1), *[(0, 0)] * 5])
    with pytest.raises(PassError, match=f"'{names[0]}' and '{names[1]}' both forecast the node"):
        tiny.compiled("flux", plan)


@pytest.mark.parametrize("model", MODELS)
def test_every_site_is_known_to_the_oracle(model: str) -> None:
    """What the oracle writes down by module path, the compiler finds by data flow, with the same number of tensors."""
    found = tiny.sites(model)
    for name, expected in SITES[model].items():
        assert len(found[name].ports) == len(expected), name
        assert [port.base is not None for port in found[name].ports].count(True) == sum(
            tap.base is not None for tap in expected
        ), name


@pytest.mark.parametrize("model", MODELS)
def test_all_compute_is_the_original_bit_for_bit(model: str) -> None:
    net = tiny.compiled(model, tiny.plan(model, ["output"], ALL_COMPUTE))
    ours = tiny.generate(model, tiny.denoise_with(net), 3)
    eager = tiny.generate(model, tiny.denoise_with(tiny.module(model)), 3)
    assert all(torch.equal(a, b) for mine, its in zip(ours, eager, strict=True) for a, b in zip(mine, its, strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_a_forecast_is_seen(model: str) -> None:
    """The comparisons above could not pass by chance: a plan changes the sample by far more than the tolerance."""
    net = tiny.compiled(model, tiny.plan(model, ["output"], [[1]] + [[0]] * (tiny.STEPS - 1)))
    ours = tiny.generate(model, tiny.denoise_with(net), 3)[-1][1]
    eager = tiny.generate(model, tiny.denoise_with(tiny.module(model)), 3)[-1][1]
    assert float((ours - eager).abs().max() / eager.abs().max()) > 100 * TOLERANCE
