"""What no step changes: its share of a denoiser's FLOPs, the bytes held for it, and the time that holding it saves.

    python benchmarks/hoisting.py [--repeats 3] [--only pixart] [--backend eager]

Writes benchmarks/results/hoisting.json. Ten families at random weights: the kind, order and width of their layers are
the released ones' or half of them; tokens of prompt and sample stand in the released ratio, both divided by the same
number. There are fewer blocks, so what stands outside of them weighs more: a second share takes that back. The two
sides are the same all-compute plan with and without hoisting, called in turns. The time saved is that of a call after a
session's first, which makes the values; what that one takes more is listed too. A row whose two sides differ in a bit
on the eager backend gets no time.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import diffusers
import measure
import torch
import typer
from diffusers.models.embeddings import get_1d_rotary_pos_embed, get_2d_rotary_pos_embed
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dcc
from dcc.passes.invariants import frontier, invariants, worth_hoisting
from dcc.variants.build import build
from dcc.variants.hoisted import moving_inputs
from dcc.variants.observe import Observer

STEPS = 10


@dataclass(frozen=True)
class Case:
    """A family: its diffusers class, how it is built, one call, and the released sizes that the ratio comes from."""

    name: str
    cls: str
    config: dict[str, Any]
    inputs: Callable[[Callable[..., Tensor]], dict[str, Any]]
    sizes: str  # prompt tokens to sample tokens, as released and here
    depth: float = 1.0  # blocks as released, of those here
    steps_in: str = "timestep"
    scale: float = 1.0  # the timestep's value at the first step

    @property
    def sample(self) -> str:
        """The input that moves: the first."""
        return next(iter(self.inputs(_draw())))

    def build(self) -> nn.Module:
        """The denoiser; zero weights get noise, so that no value is 0 by accident."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            net = getattr(diffusers, self.cls)(**self.config).eval().requires_grad_(False)
        for weight in net.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=0.02)
        return net


def loop(case: Case) -> Callable[[nn.Module, Any], Tensor]:
    """One sampling run: the output is fed back into the sample with a small step."""

    @torch.no_grad()
    def run(net: nn.Module, prompt: Any) -> Tensor:
        inputs = case.inputs(_draw()) | {"return_dict": False}
        for step in range(STEPS):
            level = torch.full_like(inputs[case.steps_in], case.scale * (1 - step / STEPS))
            x = inputs[case.sample]
            output = net(**(inputs | {case.steps_in: level}))[0].narrow(1, 0, x.shape[1])
            inputs[case.sample] = x - output / STEPS
        return inputs[case.sample]

    return run


def _draw() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def _ids(height: int, width: int) -> Tensor:
    grid = torch.stack(torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij"), -1)
    return torch.cat([torch.zeros(height * width, 1), grid.flatten(0, 1)], 1)


# fmt: off
UNET = dict(layers_per_block=2, sample_size=32)
CASES = (
    Case("u-net, 4 levels", "UNet2DConditionModel", UNET | dict(
            block_out_channels=(160, 320, 640, 640), cross_attention_dim=384, attention_head_dim=8),
         lambda d: dict(sample=d(2, 4, 32, 32), timestep=torch.ones(()), encoder_hidden_states=d(2, 19, 384)),
         "77 to 4096; 19 to 1024", scale=999.0),
    Case("u-net, deep transformers", "UNet2DConditionModel", UNET | dict(
            block_out_channels=(160, 320, 640), cross_attention_dim=1024, attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 5), use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time", addition_time_embed_dim=128, projection_class_embeddings_input_dim=1408),
         lambda d: dict(sample=d(2, 4, 32, 32), timestep=torch.ones(()), encoder_hidden_states=d(2, 5, 1024),
                        added_cond_kwargs=dict(text_embeds=d(2, 640), time_ids=torch.ones(2, 6))),
         "77 to 16384; 5 to 1024", scale=999.0),
    Case("pixart", "PixArtTransformer2DModel", dict(
            num_attention_heads=8, attention_head_dim=72, num_layers=4, cross_attention_dim=576, sample_size=32,
            caption_channels=2048, use_additional_conditions=False),
         lambda d: dict(hidden_states=d(2, 4, 32, 64), timestep=torch.ones(2), encoder_hidden_states=d(2, 37, 2048),
                        encoder_attention_mask=torch.ones(2, 37),
                        added_cond_kwargs=dict(resolution=None, aspect_ratio=None)),
         "300 to 4096; 37 to 512", 28 / 4, scale=999.0),
    Case("sana", "SanaTransformer2DModel", dict(
            in_channels=32, out_channels=32, num_attention_heads=35, attention_head_dim=32, num_layers=3,
            num_cross_attention_heads=10, cross_attention_head_dim=112, cross_attention_dim=1120,
            caption_channels=2304, sample_size=16),
         lambda d: dict(hidden_states=d(2, 32, 16, 16), timestep=torch.ones(2), encoder_hidden_states=d(2, 75, 2304),
                        encoder_attention_mask=torch.ones(2, 75)),
         "300 to 1024; 75 to 256", 20 / 3, scale=999.0),
    Case("hunyuandit", "HunyuanDiT2DModel", dict(
            num_attention_heads=8, attention_head_dim=88, in_channels=4, patch_size=2, sample_size=64,
            hidden_size=704, num_layers=4, cross_attention_dim=1024, cross_attention_dim_t5=2048,
            pooled_projection_dim=1024, text_len=10, text_len_t5=32),
         lambda d: dict(hidden_states=d(2, 4, 32, 64), timestep=torch.ones(2), encoder_hidden_states=d(2, 10, 1024),
                        text_embedding_mask=torch.ones(2, 10), encoder_hidden_states_t5=d(2, 32, 2048),
                        text_embedding_mask_t5=torch.ones(2, 32), style=torch.zeros(2).long(),
                        image_meta_size=torch.ones(2, 6) * 1024,
                        image_rotary_emb=get_2d_rotary_pos_embed(88, ((0, 0), (16, 32)), (16, 32), output_type="pt")),
         "333 to 4096; 42 to 512", 40 / 4, scale=999.0),
    Case("wan", "WanTransformer3DModel", dict(
            num_attention_heads=6, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096,
            freq_dim=256, ffn_dim=4480, num_layers=3),
         lambda d: dict(hidden_states=d(1, 16, 4, 32, 32), timestep=torch.ones(1),
                        encoder_hidden_states=d(1, 16, 4096)),
         "512 to 32760; 16 to 1024", 30 / 3, scale=999.0),
    Case("ltx", "LTXVideoTransformer3DModel", dict(
            num_attention_heads=16, attention_head_dim=64, in_channels=128, out_channels=128, cross_attention_dim=1024,
            num_layers=3, caption_channels=4096),
         lambda d: dict(hidden_states=d(1, 1024, 128), encoder_hidden_states=d(1, 26, 4096), timestep=torch.ones(1),
                        encoder_attention_mask=torch.ones(1, 26), num_frames=4, height=16, width=16,
                        rope_interpolation_scale=(1 / 25, 32, 32)),
         "128 to 4992; 26 to 1024", 28 / 3, scale=999.0),
    Case("flux", "FluxTransformer2DModel", dict(
            in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=128, num_attention_heads=6,
            joint_attention_dim=4096, pooled_projection_dim=768, axes_dims_rope=(16, 56, 56), guidance_embeds=True),
         lambda d: dict(hidden_states=d(1, 512, 64), encoder_hidden_states=d(1, 64, 4096),
                        pooled_projections=d(1, 768), timestep=torch.ones(1), guidance=torch.full((1,), 3.5),
                        img_ids=_ids(16, 32), txt_ids=torch.zeros(64, 3)),
         "512 to 4096; 64 to 512", 38 / 4),
    Case("sd3", "SD3Transformer2DModel", dict(
            sample_size=64, num_layers=4, attention_head_dim=64, num_attention_heads=12, joint_attention_dim=4096,
            caption_projection_dim=768, pooled_projection_dim=2048, in_channels=16, out_channels=16,
            pos_embed_max_size=96),
         lambda d: dict(hidden_states=d(2, 16, 32, 64), encoder_hidden_states=d(2, 42, 4096),
                        pooled_projections=d(2, 2048), timestep=torch.ones(2)),
         "333 to 4096; 42 to 512", 24 / 4, scale=999.0),
    Case("stable-audio", "StableAudioDiTModel", dict(
            sample_size=512, num_layers=4, attention_head_dim=64, num_attention_heads=12,
            num_key_value_attention_heads=6, cross_attention_dim=768, global_states_input_dim=1536,
            cross_attention_input_dim=768),
         lambda d: dict(hidden_states=d(2, 64, 512), timestep=torch.ones(2), encoder_hidden_states=d(2, 65, 768),
                        global_hidden_states=d(2, 1, 1536),
                        rotary_embedding=get_1d_rotary_pos_embed(32, 513, use_real=True, repeat_interleave_real=False)),
         "130 to 1024; 65 to 512", 24 / 4),
)
# fmt: on


def shares(net: dcc.CompiledDenoiser, depth: float) -> dict[str, Any]:
    """Shares of one call's FLOPs and of the weights' bytes, by what they depend on.

    "released" are those with `depth` times as many blocks: what stands outside of them then weighs less.
    """
    captured, sites = net.subject.captured, net.subject.sites
    graph_module, costs, flow = captured.graph_module, sites.costs, sites.flow
    moving, clock = moving_inputs(sites), captured.inputs[net.recording.time]
    used = flow.needed()
    fixed = invariants(graph_module, moving) & used
    timed = (invariants(graph_module, moving - {clock}) & used) - fixed
    start = time.perf_counter()
    names = worth_hoisting(graph_module, costs, moving)
    seconds = time.perf_counter() - start
    hoisted = flow.needed_for(names)

    inside = {name for block in sites.order for name in block.nodes}

    def flops(names: set[str], times: float = 1.0) -> float:
        deep = {name: cost.flops * (times if name in inside else 1.0) for name, cost in costs.items()}
        return sum(deep[name] for name in names if name in deep) / sum(deep.values())

    def weights(names: set[str]) -> float:
        """Of the weights that all users of are among the names."""
        all_bytes = {name: costs[name].bytes for name in captured.weights if name in used}
        own = (n for n in graph_module.graph.nodes if n.name in all_bytes and all(u.name in names for u in n.users))
        return sum(all_bytes[node.name] for node in own) / sum(all_bytes.values())

    return {
        "gflop": sites.flops / 1e9,
        "nodes": len(graph_module.graph.nodes),
        "fixed_share": flops(fixed),
        "fixed_values": len(frontier(graph_module, invariants(graph_module, moving))),
        "hoisted_share": flops(hoisted),
        "hoisted_share_released": flops(hoisted, depth),
        "hoisted_values": len(names),
        "hoisted_weights_share": weights(hoisted),
        "timestep_share": flops(timed),
        "timestep_share_released": flops(timed, depth),
        "timestep_weights_share": weights(timed),
        "analysis_s": seconds,
    }


def paired(case: Case, plain: nn.Module, held: nn.Module, repeats: int) -> tuple[list[list[float]], float]:
    """Seconds of [plain, held] at every step of `repeats` runs after one that does not count, and their difference.

    Both sides are called at each step with the same inputs, in turns first, so that a noisy second hits both alike.
    The difference is the largest of a step: the norm relative to the output's.
    """
    seconds, worst = [], 0.0
    for repeat in range(repeats + 1):
        inputs = case.inputs(_draw()) | {"return_dict": False}
        for step in range(STEPS):
            at = {case.steps_in: torch.full_like(inputs[case.steps_in], case.scale * (1 - step / STEPS))}
            taken, outputs = [0.0, 0.0], [torch.empty(0)] * 2
            for side in (0, 1) if (step + repeat) % 2 else (1, 0):
                start = time.perf_counter()
                outputs[side] = (plain, held)[side](**(inputs | at))[0]
                taken[side] = time.perf_counter() - start
            worst = max(worst, float((outputs[1] - outputs[0]).norm() / outputs[0].norm()))
            x = inputs[case.sample]
            inputs[case.sample] = x - outputs[0].narrow(1, 0, x.shape[1]) / STEPS
            if repeat:
                seconds.append(taken)
    return seconds, worst


def time_case(case: Case, repeats: int, backend: str) -> dict[str, Any]:
    """One row of the table."""
    net = case.build()
    held = dcc.compiled(dcc.compile(net, [0], sample=loop(case), policy="interval", interval=1, backend=backend))
    dcc.restore(net)
    plain = held.with_plan(held.plan)
    plain.families[:] = [build(held.plan, held.subject.sites, Observer(), hoist=False)]
    seconds, difference = paired(case, plain, held, repeats)
    row = {"case": case.name, "class": case.cls, "sizes": case.sizes, "difference": difference}
    row |= shares(held, case.depth)
    row |= {"hoisted_bytes": held.summary().hoisted_bytes, "prologues": held.summary().prologues}
    assert plain.summary().prologues == 0
    if difference > (0 if backend == "eager" else 1e-4):
        return row | {"problem": "the two sides differ"}
    first, later = seconds[::STEPS], [pair for i, pair in enumerate(seconds) if i % STEPS]
    return row | {
        "call_ms": 1e3 * statistics.median(plain for plain, _ in later),
        "saved_share": 1 - statistics.median(held / plain for plain, held in later),
        "first_call_share": statistics.median(held / plain for plain, held in first) - 1,
        "seconds": seconds,
        "compile_s": held.summary().compile_seconds,
    }


def main(
    repeats: Annotated[int, typer.Option(help="timed runs of each side")] = 3,
    only: Annotated[str, typer.Option(help="cases whose name contains this")] = "",
    backend: Annotated[str, typer.Option(help="eager or inductor")] = "eager",
    name: Annotated[str, typer.Option(help="of the result file")] = "hoisting",
) -> None:
    """Measures every case and writes the result file."""
    columns = ("family", "call, ms", "fixed", "hoisted", "at full depth", "values", "bytes", "timestep only")
    columns += ("call saved", "first call")
    table, rows = Table(*columns), []
    for case in CASES:
        if only not in case.name:
            continue
        row = time_case(case, repeats, backend)
        rows.append(row)
        table.add_row(
            case.name,
            f"{row.get('call_ms', 0):.0f}",
            f"{row['fixed_share']:.2%}",
            f"{row['hoisted_share']:.2%}",
            f"{row['hoisted_share_released']:.2%}",
            str(row["hoisted_values"]),
            f"{row['hoisted_bytes'] / 1e6:.2f} MB",
            f"{row['timestep_share']:.2%}",
            f"{row['saved_share']:.2%}" if "saved_share" in row else row["problem"],
            f"{row['first_call_share']:+.1%}" if "saved_share" in row else "",
        )
        print(f"{case.name}: done", flush=True)
    Console(width=120).print(table)
    print(measure.write(name, {"backend": backend, "repeats": repeats, "steps": STEPS, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
