"""Odd modules by what they do with memory and number types: writes, views, strides, autocast, double, complex."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .odd_modules import LEVELS, Net, Prompt, See, first_of, level, loop, odd


@odd("memory")
class AddsToItsInput(Net):
    """Writes to the sample it is given."""

    def forward(self, x, t, ctx):
        x.add_(0.1)
        return super().forward(x, t, ctx)


@odd("memory")
class ScalesTheText(Net):
    """Writes to the text it is given, so that every step has a fainter one."""

    def forward(self, x, t, ctx):
        ctx.mul_(0.9)
        return super().forward(x, t, ctx)


@odd("memory")
class ZeroesATokenOfItsInput(Net):
    """Writes to a view of the sample."""

    def forward(self, x, t, ctx):
        x[:, 0].zero_()
        return super().forward(x, t, ctx)


@odd("memory")
class WritesThroughNumpy(Net):
    """Writes to the sample by way of an array on its memory."""

    def forward(self, x, t, ctx):
        x.numpy()[:, -1] *= 0.5
        return super().forward(x, t, ctx)


@odd("memory")
class AnswersInABuffer(Net):
    """Its answer is a buffer, which the next call overwrites."""

    def __init__(self):
        super().__init__()
        self.register_buffer("answer", torch.zeros(2, 8, 4), persistent=False)

    def forward(self, x, t, ctx):
        if self.answer.shape != x.shape:
            self.answer = torch.zeros_like(x)
        return self.answer.copy_(super().forward(x, t, ctx))


@odd("memory")
class WorksInABuffer(Net):
    """Writes its hidden values to memory that it keeps, with `out=`."""

    def __init__(self):
        super().__init__()
        self.work = torch.empty(0)

    def forward(self, x, t, ctx):
        with torch.no_grad():
            torch.sin(self.hidden(x, t, ctx), out=self.work.resize_(0))
        return self.out(self.work)


@odd("memory")
class GivesAView(Net):
    """Its answer is a part of something larger."""

    def forward(self, x, t, ctx):
        return torch.cat([super().forward(x, t, ctx), ctx[..., :4].mean(1, keepdim=True)], 1)[:, :-1]


@odd("memory")
class GivesATransposed(Net):
    """Its answer lies in memory the other way round."""

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx).transpose(1, 2).contiguous().transpose(1, 2)


@odd("memory")
class GivesAnExpanded(Net):
    """Its answer repeats one token without memory of its own."""

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx).mean(1, keepdim=True).expand_as(x)


@odd("memory")
class GivesItsWeight(Net):
    """Its own parameter stands beside the answer."""

    def forward(self, x, t, ctx):
        return super().forward(x, t, ctx), self.out.bias


def writes_to_the_answer(net: Any, prompt: Prompt, see: See) -> Tensor:
    """Its user goes on in the memory of the answer, and looks at the sample again."""
    x = prompt.x
    with torch.no_grad():
        for value in LEVELS:
            out = net(x, level(x, value), prompt.ctx)
            see(out, x)
            step = first_of(out)
            step.mul_(-0.1).add_(prompt.x)
            see(out, x)
            x = step.clone()
    return x


@odd("memory", loop=writes_to_the_answer)
class GivesAViewOfItsInput(Net):
    """Its answer is a view of the sample, which it has written to; so is what its user writes to."""

    def forward(self, x, t, ctx):
        x.copy_(super().forward(x, t, ctx))
        return x.view(len(x), -1, 4)


@odd("memory", loop=writes_to_the_answer)
class WrittenByItsUser(Net):
    """The plain denoiser, whose answers are written to."""


def expanded(net: Any, prompt: Prompt, see: See) -> Tensor:
    """The text is one sample, expanded, and the level is too."""
    x = prompt.x
    with torch.no_grad():
        for value in LEVELS:
            out = net(x, torch.tensor([value]).expand(len(x)), prompt.ctx[:1].expand(len(x), -1, -1))
            see(out)
            x = x - 0.1 * out
    return x


@odd("memory", loop=expanded, long=True)
class TakesExpanded(Net):
    """Answers otherwise where a stride is zero."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h.sin() if ctx.stride(0) == 0 and len(x) > 1 else h)


def transposed(net: Any, prompt: Prompt, see: See) -> Tensor:
    """The sample lies in memory the other way round."""
    x = prompt.x.transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad():
        for value in LEVELS:
            out = net(x, level(x, value), prompt.ctx)
            see(out)
            x = x - 0.1 * out
    return x


@odd("memory", loop=transposed)
class ReadsTheMemory(Net):
    """Reads the sample's memory as it lies, whatever its strides."""

    def forward(self, x, t, ctx):
        flat = x.as_strided((x.numel(),), (1,)).reshape(x.shape)
        return super().forward(flat, t, ctx)


def of_images(net: Any, prompt: Prompt, see: See) -> Tensor:
    """The sample is an image whose channels lie next to each other."""
    x = prompt.x.transpose(1, 2)[..., None].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for value in LEVELS:
            out = net(x, level(x, value), prompt.ctx)
            see(out)
            x = x - 0.1 * out
    return x


@odd("memory", loop=of_images)
class ChannelsLast(nn.Module):
    """Convolutions with weights in channels-last, which keep that layout."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, t, ctx):
        return self.out((self.into(x) + t[:, None, None, None] + ctx.mean((1, 2))[:, None, None, None]).tanh())


def in_inference_mode(net: Any, prompt: Prompt, see: See) -> Tensor:
    """The loop runs in inference mode, and writes to the sample in place."""
    with torch.inference_mode():
        x = prompt.x.clone()
        for value in LEVELS:
            out = net(x, level(x, value), prompt.ctx)
            see(out)
            x.sub_(0.1 * out)
    return x


@odd("memory", loop=in_inference_mode)
class InInferenceMode(Net):
    """Answers otherwise for tensors of inference mode."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(h.sin() if x.is_inference() else h)


@odd("memory")
class AutocastInside(Net):
    """Computes under autocast."""

    def forward(self, x, t, ctx):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x, t, ctx).float()


def under_autocast(net: Any, prompt: Prompt, see: See) -> Tensor:
    """The loop runs under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return loop(net, prompt, see)


@odd("memory", loop=under_autocast, long=True)
class AutocastOffInside(Net):
    """Runs under its user's autocast, but computes one layer without."""

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        with torch.autocast("cpu", enabled=False):
            return self.out(h.float())


@odd("memory", long=True)
class AutocastNested(Net):
    """Autocast, off and on again, inside."""

    def forward(self, x, t, ctx):
        with torch.autocast("cpu", torch.bfloat16):
            h = self.hidden(x, t, ctx)
            with torch.autocast("cpu", enabled=False):
                h = h.float() * t[:, None, None]
                with torch.autocast("cpu", torch.float16):
                    return self.out(h).double().float()


@odd("memory")
class DoubleInside(Net):
    """Half of it computes in double precision."""

    def __init__(self):
        super().__init__()
        self.out.double()

    def forward(self, x, t, ctx):
        return self.out(self.hidden(x, t, ctx).double().softmax(-1)).to(x.dtype)


@odd("memory")
class HalfWeights(Net):
    """Weights in bfloat16, cast to and fro."""

    def __init__(self):
        super().__init__()
        self.bfloat16()
        self.out.float()

    def forward(self, x, t, ctx):
        return self.out(self.hidden(x.bfloat16(), t.bfloat16(), ctx.bfloat16()).float())


@odd("memory", long=True)
class FilteredFrequencies(Net):
    """Goes through the complex numbers of a Fourier transform."""

    def forward(self, x, t, ctx):
        spectrum = torch.fft.rfft(self.hidden(x, t, ctx), dim=1)
        spectrum[:, 1:] *= 0.5j
        return self.out(torch.fft.irfft(spectrum, n=x.shape[1], dim=1))


@odd("memory")
class GivesComplexNumbers(Net):
    """Complex numbers, and their conjugates, stand beside the answer."""

    def forward(self, x, t, ctx):
        out = super().forward(x, t, ctx)
        spectrum = torch.fft.fft(out, dim=1)
        return out, spectrum, spectrum.conj()


@odd("memory", long=True)
class SparseInside(Net):
    """Multiplies by a sparse matrix that it keeps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mixing", torch.eye(8).roll(1, 0).to_sparse())

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.out(torch.sparse.mm(self.mixing, h.flatten(0, 1).t()).t().reshape(h.shape))


@odd("memory")
class TiedWeights(Net):
    """Two layers with one weight, used both ways round."""

    def __init__(self):
        super().__init__()
        self.back = nn.Linear(8, 4, bias=False)
        self.back.weight = nn.Parameter(self.into.weight.detach().t())
        self.again = self.into

    def forward(self, x, t, ctx):
        h = self.hidden(x, t, ctx)
        return self.again(self.back(h)) @ self.into.weight
