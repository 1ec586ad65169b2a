"""Small denoisers of image and text tokens, whose sizes may coincide, with the sites that an oracle of hooks knows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .oracle import Made, Sites, Taken, Tap

WIDTH, LATENT, TEXT = 8, 4, 6


class Attention(nn.Module):
    """Joint attention over text and image tokens; gives both parts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.text_qkv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.proj, self.text_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = torch.cat([self.text_qkv(text), self.qkv(image)], 1)[:, None].chunk(3, -1)
        both = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.text_proj(both[:, : text.shape[1]]), self.proj(both[:, text.shape[1] :])


class Double(nn.Module):
    """A block with a stream for each kind of token."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.text_mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.gates = nn.Linear(1, 4 * WIDTH)

    def forward(self, text: Tensor, image: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, d = self.gates(time)[:, None].chunk(4, -1)
        more_text, more_image = self.attn(
            F.layer_norm(text, (WIDTH,)) * (1 + a), F.layer_norm(image, (WIDTH,)) * (1 + b)
        )
        text, image = text + c * more_text, image + d * more_image
        image = image + b * self.mlp(F.layer_norm(image, (WIDTH,)))
        return text + a * self.text_mlp(F.layer_norm(text, (WIDTH,))), image


class Single(nn.Module):
    """A block of one stream of all tokens, split again at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.proj = nn.Linear(3 * WIDTH, WIDTH)
        self.gate = nn.Linear(1, WIDTH)

    def forward(self, text: Tensor, image: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([text, image], 1)
        normal = F.layer_norm(both, (WIDTH,))
        q, k, v = self.qkv(normal)[:, None].chunk(3, -1)
        inner = torch.cat([F.scaled_dot_product_attention(q, k, v)[:, 0], F.gelu(self.up(normal))], -1)
        both = both + self.gate(time)[:, None] * self.proj(inner)
        return both[:, : text.shape[1]], both[:, text.shape[1] :]


class Tokens(nn.Module):
    """Image tokens [B, N, 4] and text tokens [B, M, 6] through double blocks, then single ones.

    `fixed` is a number of tokens: the image then has one learned position for each, and learned tokens stand in the
    place of the text, so that both numbers are the same in every call and no symbol tells them apart.
    """

    def __init__(self, fixed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image_in, self.text_in, self.out = (
            nn.Linear(LATENT, WIDTH),
            nn.Linear(TEXT, WIDTH),
            nn.Linear(WIDTH, LATENT),
        )
        self.pairs = nn.ModuleList(Double() for _ in range(2))
        self.joined = nn.ModuleList(Single() for _ in range(3))
        self.positions = nn.Parameter(torch.randn(1, fixed, WIDTH)) if fixed else None
        self.learned = nn.Parameter(torch.randn(1, fixed, WIDTH)) if fixed else None
        self.eval().requires_grad_(False)

    def forward(self, sample: Tensor, prompt: Tensor, time: Tensor) -> Tensor:
        image, text = self.image_in(sample), self.text_in(prompt)
        if self.positions is not None and self.learned is not None:
            image, text = image + self.positions, text.mean(1, keepdim=True) + self.learned
        for block in (*self.pairs, *self.joined):
            text, image = block(text, image, time[:, None])
        return self.out(F.layer_norm(image, (WIDTH,)))


def sites() -> Sites:
    """The sites of `Tokens`, by hand; of the last block only the image is used."""

    def text(first: str, last: str) -> Tap:
        return Tap(Made(last), Taken(first, "text"))

    def image(first: str, last: str) -> Tap:
        return Tap(Made(last, (1,)), Taken(first, "image"))

    doubles, singles = [f"pairs.{i}" for i in range(2)], [f"joined.{i}" for i in range(3)]
    order = [*doubles, *singles]
    found: Sites = {}
    for path in doubles:
        found[f"{path}/attn"] = (Tap(Made(f"{path}.attn", (1,))),)
        found[f"{path}/attn.1"] = (Tap(Made(f"{path}.attn")),)
        found[f"{path}/mlp"] = (Tap(Made(f"{path}.mlp")),)
        found[f"{path}/mlp.1"] = (Tap(Made(f"{path}.text_mlp")),)
    for path in singles:
        found[f"{path}/attn+mlp"] = (Tap(Made(f"{path}.proj")),)
    for path in order:
        found[path] = (image(path, path),) if path == order[-1] else (text(path, path), image(path, path))
    for a, b in ((1, 3), (0, 4), (2, 5), (1, 5)):
        ends = order[a], order[b - 1]
        found[f"blocks[{a}:{b}]"] = (image(*ends),) if b == len(order) else (text(*ends), image(*ends))
    found["pairs"] = (text(doubles[0], doubles[-1]), image(doubles[0], doubles[-1]))
    found["joined"] = (image(singles[0], singles[-1]),)
    found["stack"] = (image(order[0], order[-1]),)
    found["hidden"] = (Tap(Made(order[-1], (1,))),)
    found["delta"] = (Tap(Made(""), Taken("", "sample")),)
    return found | {"output": (Tap(Made("")),)}
