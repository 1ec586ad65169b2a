"""CUDA graphs of programs: buffers, copies and new recordings with a recorder on the CPU; real graphs on a GPU."""

import threading

import pytest
import torch
from torch import nn

from dcc.errors import LoweringError
from dcc.lower import cuda_graphs
from dcc.lower.cuda_graphs import MAX_RECORDINGS, Graphed
from dcc.lower.program import GRAPHED, Program, check_backend

from .nets import apart


class Tape:
    """Stands in for a pool: replays by calling again, on the very buffers that were recorded."""

    def __init__(self) -> None:
        self.lock, self.recorded, self.entered = threading.Lock(), 0, 0

    def enter(self) -> None:
        self.entered += 1

    def leave(self) -> None:
        self.entered -= 1

    def record(self, call, inputs):
        self.recorded += 1
        addresses = [value.data_ptr() for value in inputs]
        outputs = [torch.full_like(output, torch.nan) for output in call(*inputs)]

        def replay() -> None:
            assert [value.data_ptr() for value in inputs] == addresses
            for output, value in zip(outputs, call(*inputs), strict=True):
                output.copy_(value)

        return replay, outputs


class Mixer(nn.Module):
    """Two residual blocks over the sample, moved by the timestep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x, timestep, prompt):
        for block in self.blocks:
            x = x + torch.tanh(block(x) * timestep[:, None] + prompt)
        return (x,)


@torch.no_grad()
def sample(net, seed):
    device = next(net.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    x, prompt = (torch.randn(2, 16, generator=draw).to(device) for _ in range(2))
    for step in range(8):
        x = x - net(x=x, timestep=torch.full((2,), 1 - step / 8, device=device), prompt=prompt)[0] / 8
    return x


def mixed(device, **parameters):
    """The compiled mixer with a forecast every third step."""
    return apart(
        Mixer().eval().requires_grad_(False).to(device),
        [0, 1],
        sample=sample,
        policy="taylorseer",
        interval=3,
        **parameters,
    )


def call(weight, x):
    return weight @ x, x


def test_every_replay_reads_its_own_inputs_and_keeps_its_outputs():
    tape = Tape()
    graphed = Graphed(call, tape)
    weight = nn.Parameter(torch.randn(3, 3), requires_grad=False)
    first, second = torch.randn(3), torch.randn(3)
    a, same = graphed(weight, first)
    b, _ = graphed(weight, second)
    assert torch.equal(a, weight @ first) and torch.equal(b, weight @ second)
    assert torch.equal(same, first) and same.data_ptr() != first.data_ptr()
    assert (tape.recorded, tape.entered) == (1, 0)


def test_a_weight_in_place_needs_no_new_recording_a_moved_one_does():
    tape = Tape()
    graphed = Graphed(call, tape)
    weight = nn.Parameter(torch.randn(3, 3), requires_grad=False)
    x = torch.randn(3)
    graphed(weight, x)
    weight.mul_(2)
    assert torch.equal(graphed(weight, x)[0], weight @ x) and tape.recorded == 1
    weight.data = torch.randn(3, 3)
    assert torch.equal(graphed(weight, x)[0], weight @ x) and tape.recorded == 2


def test_weights_that_keep_moving_are_served_without_a_graph():
    tape = Tape()
    graphed = Graphed(call, tape)
    x, held = torch.randn(3), []
    for _ in range(MAX_RECORDINGS + 3):
        weight = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        held.append(weight)
        assert torch.equal(graphed(weight, x)[0], weight @ x)
    assert tape.recorded == MAX_RECORDINGS
    assert Program(None, "inductor", graphed).problems == [graphed.problem] and "moved 4 times" in graphed.problem


def test_threads_take_turns():
    graphed, failures = Graphed(call, Tape()), []
    weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)

    def work(seed: int) -> None:
        x = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        failures.extend(1 for _ in range(50) if not torch.equal(graphed(weight, x)[0], weight @ x))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_inputs_off_the_gpu_are_refused_by_name_of_their_device():
    assert "cpu" in cuda_graphs.refusal([torch.zeros(1)])


def test_a_mode_for_inductor_is_refused_with_the_eager_backend():
    with pytest.raises(LoweringError, match="eager"):
        check_backend("eager", "reduce-overhead")


def test_a_mode_with_graphs_says_where_there_are_none():
    problems = mixed("cpu", mode="reduce-overhead").summary().problems
    assert len(problems) == 2 and all("without a CUDA graph" in problem and "cpu" in problem for problem in problems)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", GRAPHED)
def test_graphs_on_a_gpu_equal_plain_launches(mode):
    plain, graphed = mixed("cuda"), mixed("cuda", mode=mode)
    assert not graphed.summary().problems
    assert all(isinstance(program.call, Graphed) for program in graphed.programs.values())
    for seed in range(3):
        torch.testing.assert_close(sample(graphed, seed), sample(plain, seed), rtol=1e-4, atol=1e-4)
