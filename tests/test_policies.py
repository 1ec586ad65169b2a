"""Masks of the policies, written out by hand, and what they refuse."""

import math

import pytest

import dcc
from dcc.errors import DccError, PolicyError, SettingError
from dcc.plans.predictors import Predictor
from dcc.policies import POLICIES, Setting, make_policy, parameter_names

from .nets import Net, sample

pytestmark = pytest.mark.usefixtures("graphs")


def mask(text):
    return tuple(int(character) for character in text)


@pytest.mark.parametrize(
    ("steps", "parameters", "expected"),
    [
        (10, {}, "1001001001"),
        (6, {"interval": 1}, "111111"),
        (7, {"interval": 2}, "1010101"),
        (9, {"interval": 4}, "100010001"),
        (3, {"interval": 10}, "100"),
        (1, {}, "1"),
    ],
)
def test_interval(steps, parameters, expected):
    policy = make_policy("interval", Setting(range(steps)), parameters)
    assert policy.caches[0].mask == mask(expected)
    assert policy.caches[0].predictor == Predictor("copy")
    assert policy.caches[0].site == "auto"


@pytest.mark.parametrize(
    ("steps", "parameters", "expected"),
    [
        (15, {}, "111000010000100"),
        (10, {"interval": 1}, "1111111111"),
        (10, {"interval": 3, "first": 1}, "1001001001"),
        (10, {"interval": 3, "first": 2}, "1100100100"),
        (10, {"interval": 4, "first": 4}, "1111000100"),
        (4, {"first": 9}, "1111"),
        (1, {}, "1"),
    ],
)
def test_taylorseer(steps, parameters, expected):
    policy = make_policy("taylorseer", Setting(range(steps)), parameters)
    assert policy.caches[0].mask == mask(expected)
    assert policy.caches[0].predictor == Predictor("taylor", 1)


def test_taylorseer_order_and_site():
    policy = make_policy("taylorseer", Setting(range(9)), {"order": 3, "site": "branches"})
    assert policy.caches[0].predictor == Predictor("taylor", 3)
    assert policy.caches[0].site == "branches"


@pytest.mark.parametrize("name", ["interval", "taylorseer"])
def test_a_policy_never_forecasts_the_first_step(name):
    for steps in range(1, 20):
        assert make_policy(name, Setting(range(steps)), {}).caches[0].mask[0] == 1


@pytest.mark.parametrize("name", ["interval", "taylorseer"])
def test_interval_one_is_all_compute(name):
    assert set(make_policy(name, Setting(range(12)), {"interval": 1}).caches[0].mask) == {1}


@pytest.mark.parametrize("name", ["interval", "taylorseer"])
@pytest.mark.parametrize("given", [[1, 0, 0, 1], (1, 0, 0, 1), [True, False, False, True]], ids=str)
def test_steps_mask_is_taken_as_it_is(name, given):
    policy = make_policy(name, Setting(range(4)), {"steps_mask": given, "interval": 2})
    assert policy.caches[0].mask == (1, 0, 0, 1)
    assert all(type(value) is int for value in policy.caches[0].mask)


@pytest.mark.parametrize(
    "given", [[1, 0, 0], [1, 0, 0, 1, 1], [], [1, 2, 0, 1], [1, -1, 0, 1], "1001", [1, None, 0, 1], 7], ids=str
)
def test_steps_mask_of_wrong_length_or_values(given):
    with pytest.raises(PolicyError, match=r"steps_mask(=.*|) must be (4 numbers|of type list\[int\])"):
        make_policy("interval", Setting(range(4)), {"steps_mask": given})


def test_steps_mask_must_begin_with_one():
    with pytest.raises(PolicyError, match="steps_mask must begin with 1"):
        make_policy("taylorseer", Setting(range(3)), {"steps_mask": [0, 1, 1]})


@pytest.mark.parametrize("value", [0, -2, 2.5, "3", None])
def test_bad_interval(value):
    with pytest.raises(PolicyError, match="interval="):
        make_policy("interval", Setting(range(10)), {"interval": value})


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_bad_first(value):
    with pytest.raises(PolicyError, match="first="):
        make_policy("taylorseer", Setting(range(10)), {"first": value})


def test_bad_order_names_the_range():
    with pytest.raises(PolicyError, match=r"order=9.*from 1 to 4"):
        make_policy("taylorseer", Setting(range(10)), {"order": 9})


def test_unknown_policy_lists_the_known_ones():
    with pytest.raises(PolicyError, match="'magic'; there are: interval, deepcache, "):
        make_policy("magic", Setting(range(10)), {})


def test_unknown_parameters_list_those_of_this_policy():
    with pytest.raises(PolicyError, match="'interval' takes no parameter 'order', 'colour'; it takes: ") as caught:
        make_policy("interval", Setting(range(10)), {"order": 1, "interval": 2, "colour": 3})
    assert str(caught.value).endswith("it takes: interval, site, steps_mask")


def test_parameter_names():
    assert parameter_names("taylorseer") == ["interval", "order", "first", "site", "steps_mask"]


@pytest.mark.parametrize("policy", dcc.policies.names())
def test_every_policy_runs_or_says_why_it_cannot(policy):
    """On a denoiser with neither blocks nor modulation nor attention; a refusal leaves the module as it was."""
    net = Net().eval()
    before = dict(vars(net))
    try:
        dcc.compile(net, [1], sample=sample, policy=policy, backend="eager")
    except dcc.errors.DccError as refusal:
        assert "need" in str(refusal) or "no site" in str(refusal) or "no group" in str(refusal), refusal
    else:
        assert sample(net, 1).isfinite().all()
        assert dcc.compiled(net).sessions.counts.computed >= 1
        dcc.restore(net)
    assert vars(net) == before


JUNK = ("x", b"x", -1, 0, 1.5, True, None, math.nan, math.inf, [], (), [1], ["x"], [[1]], {}, {"a": 1}, object(), 2j)


@pytest.mark.parametrize("name", POLICIES)
def test_a_parameter_of_a_wrong_type_or_value_is_refused_or_taken_but_never_raises_something_else(name: str) -> None:
    refused = 0
    for parameter in POLICIES[name].parameters:
        for value in JUNK:
            try:
                make_policy(name, Setting(range(6)), {parameter: value})
            except DccError as error:
                refused += 1
                assert parameter in str(error) or isinstance(error, SettingError) or "needs" in str(error), error
    assert refused >= 10 * len(POLICIES[name].parameters)


def test_the_message_of_a_wrong_type_says_the_right_one() -> None:
    for parameters, message in (
        ({"interval": "x"}, r"policy 'interval': interval='x' must be of type int"),
        ({"interval": True}, r"interval=True must be of type int"),
        ({"steps_mask": 5}, r"steps_mask=5 must be of type list\[int\] or None"),
        ({"steps_mask": ["1"]}, r"steps_mask=list \['1'\] must be of type list\[int\] or None"),
        ({"site": 3}, r"site=3 must be of type str"),
    ):
        with pytest.raises(PolicyError, match=message):
            make_policy("interval", Setting(range(6)), parameters)
