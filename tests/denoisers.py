"""Small random-weight denoisers of many diffusers families, for capture tests.

``CASES`` has one entry per architecture. ``case.build()`` gives a module of 50k to 400k weights (eval mode, no
gradients, the same weights on each call); ``case.inputs(batch, seed, timestep)`` gives the keyword arguments of its
forward in the form the diffusers pipelines pass them: a leading batch dimension unless noted, ``return_dict=False``,
lists, tuples and dicts of tensors where the model asks for them. Forwards take 2 to 20 ms on one core.

Left out on purpose: Lumina2Transformer2DModel (reads prompt lengths with ``tolist()``; torch.export rejects it) and
UNetSpatioTemporalConditionModel (works, but takes 40 ms per forward and 20 s to export with ``Dim.AUTO``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models import embeddings
from torch import nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Case:
    """One architecture."""

    name: str  # short and unique, for test ids
    family: str  # "mmdit" | "dit" | "dit-cross" | "unet" | "video" | "audio"
    build: Callable[[], nn.Module]
    # (batch=2, seed=0, timestep=500.0) -> kwargs of forward. Row i of every batched tensor depends on (seed, i) only:
    # a batch of 3 extends a batch of 2. Only the entries holding the timestep (0..1000, or scaled to 0..1) change.
    inputs: Callable[..., dict[str, Any]]
    # Module paths of the repeated blocks ("transformer_blocks", ...), as they start in nn_module_stack.
    blocks: tuple[str, ...]
    # True where torch.export at batch 2 with every tensor dimension Dim.AUTO gives a module that runs batch 3 bit-equal
    # to eager; otherwise why_static says why not. (Batch 1 too, but for hunyuandit, latte and unet-motion: guards.)
    dynamic: bool = True
    why_static: str = ""
    warns: str = ""  # how a warning starts that the eager forward itself raises (tests make warnings errors)

    def __str__(self) -> str:
        return self.name


class Draw:
    """Seeded tensors for one call of ``inputs``."""

    def __init__(self, batch: int, seed: int, timestep: float):
        self.batch, self.seed, self.t, self._drawn = batch, seed, float(timestep), 0

    def __call__(self, *shape: int) -> torch.Tensor:
        """Standard normal (batch, *shape)."""
        self._drawn += 1
        rows = [1_000_003 * self.seed + 1009 * self._drawn + row for row in range(self.batch)]
        return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(row)) for row in rows])

    def same(self, *values: float) -> torch.Tensor:
        """The same values for each sample: (batch, len(values))."""
        return torch.tensor([values]).repeat(self.batch, 1)

    def each(self, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One value for each sample: (batch,)."""
        return torch.full((self.batch,), value).to(dtype)

    def step(self) -> torch.Tensor:
        """Timestep as (batch,) integers."""
        return self.each(self.t, torch.long)

    def sigma(self) -> torch.Tensor:
        """Timestep as (batch,) in 0..1."""
        return self.each(self.t * 1e-3)

    def scalar(self) -> torch.Tensor:
        """Timestep as a 0-dim integer tensor, as schedulers hand it out."""
        return torch.tensor(self.t).long()

    def mask(self, length: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
        """Token mask (batch, length): ones, but for the last position of odd rows."""
        mask = torch.ones(self.batch, length)
        mask[1::2, -1] = 0
        return mask.to(dtype)


def wake(model: nn.Module) -> nn.Module:
    """Let timestep and prompt reach the output: all-zero parameters (gates, projections, biases) and padding tokens
    (uninitialised memory) get small noise, linear and convolution weights the gain sqrt(3) torch's default omits."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            module.weight.data *= 3**0.5
    for name, p in model.named_parameters():
        if not p.any() or "pad_token" in name:
            nn.init.normal_(p, std=0.05)
    return model.eval().requires_grad_(False)


def first(out: Any) -> torch.Tensor:
    """The first tensor of a forward's output (tensor, tuple or model output)."""
    return pytree.tree_leaves(out)[0]


def batch_dims(case: Case) -> Any:
    """The inputs with each tensor replaced by its batch dimension, other leaves and unbatched tensors by None.

    None as a whole where the structure depends on the batch (one list entry per sample).
    """
    two, five = case.inputs(batch=2), case.inputs(batch=5)
    if pytree.tree_structure(two) != pytree.tree_structure(five):
        return None

    def dim(a: Any, b: Any) -> int | None:
        if not isinstance(a, torch.Tensor):
            return None
        return next((i for i in range(a.dim()) if a.shape[i] != b.shape[i]), None)

    return pytree.tree_map(dim, two, five)


Make = Callable[[Draw], dict[str, Any]]


def _build(cls: str, config: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Chroma: diffusers deprecates its own FluxPosEmbed
        torch.manual_seed(0)
        return wake(getattr(diffusers, cls)(**config))


def _inputs(make: Make, batch: int = 2, seed: int = 0, timestep: float = 500.0) -> dict[str, Any]:
    return make(Draw(batch, seed, timestep)) | {"return_dict": False}


def _ids(height: int, width: int, axes: int = 3) -> torch.Tensor:
    """Positions of an image's tokens: (height * width, axes)."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return ids.reshape(-1, axes)


def _allegro_rope(dim: int, frames: int, height: int, width: int) -> tuple[Any, Any]:
    """((cos, sin) pairs for t, h, w), (token positions t, h, w: (1, frames * height * width))."""
    size = (height, width)
    *freqs, t, h, w = embeddings.get_3d_rotary_pos_embed_allegro(dim, ((0, 0), size), size, frames)
    grid = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1).contiguous()
    return tuple(freqs), tuple(grid.unbind(0))


# fmt: off
def _case(name: str, family: str, cls: str, config: dict[str, Any], make: Make, blocks: str = "transformer_blocks",
          static: str = "", warns: str = "") -> Case:
    build, inputs = partial(_build, cls, config), partial(_inputs, make)
    return Case(name, family, build, inputs, tuple(blocks.split()), not static, static, warns)


_TWO = "transformer_blocks single_transformer_blocks"
_UNET_BLOCKS = "down_blocks mid_block up_blocks"
_HEADS = dict(num_attention_heads=2, attention_head_dim=16)
_LATENT = dict(in_channels=4, out_channels=4)
_JOINT = dict(_HEADS, in_channels=4, joint_attention_dim=32)
_HUNYUAN = dict(_HEADS, **_LATENT, num_layers=2, num_single_layers=2, num_refiner_layers=1, text_embed_dim=32)
_UNET = dict(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
             down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))

# Images are 8x12 latents (24 tokens), videos 3 frames of them (72 tokens), prompts 7 tokens of 32 channels.
CASES: tuple[Case, ...] = (
    # Joint attention over image and text.
    _case(
        "flux", "mmdit", "FluxTransformer2DModel",
        dict(_JOINT, num_layers=2, num_single_layers=3, pooled_projection_dim=32, guidance_embeds=True,
             axes_dims_rope=(4, 4, 8)),
        lambda d: dict(hidden_states=d(24, 4), encoder_hidden_states=d(7, 32), pooled_projections=d(32),
                       timestep=d.sigma(), guidance=d.each(3.5), img_ids=_ids(4, 6), txt_ids=torch.zeros(7, 3)),
        _TWO,
    ),
    _case(
        "flux2", "mmdit", "Flux2Transformer2DModel",
        dict(_JOINT, num_layers=2, num_single_layers=3, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4)),
        lambda d: dict(hidden_states=d(24, 4), encoder_hidden_states=d(7, 32), timestep=d.sigma(),
                       guidance=d.each(3.5), img_ids=_ids(4, 6, 4), txt_ids=_ids(1, 7, 4)),
        _TWO,
    ),
    _case(
        "chroma", "mmdit", "ChromaTransformer2DModel",
        dict(_JOINT, num_layers=2, num_single_layers=3, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32,
             approximator_layers=1),
        lambda d: dict(hidden_states=d(24, 4), encoder_hidden_states=d(7, 32), timestep=d.sigma(),
                       img_ids=_ids(4, 6), txt_ids=torch.zeros(7, 3), attention_mask=d.mask(31)),
        _TWO, static="builds torch.tensor([0] * batch), which fixes the batch size",
    ),
    _case(
        "sd3", "mmdit", "SD3Transformer2DModel",
        dict(_JOINT, out_channels=4, sample_size=12, num_layers=3, caption_projection_dim=32, pooled_projection_dim=32,
             pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,)),
        lambda d: dict(hidden_states=d(4, 8, 12), encoder_hidden_states=d(7, 32), pooled_projections=d(32),
                       timestep=d.step()),
    ),
    _case(
        "qwenimage", "mmdit", "QwenImageTransformer2DModel",
        dict(_JOINT | dict(in_channels=16), out_channels=4, num_layers=3, axes_dims_rope=(4, 4, 8)),
        lambda d: dict(hidden_states=d(24, 16), encoder_hidden_states=d(7, 32), encoder_hidden_states_mask=d.mask(7),
                       timestep=d.sigma(), img_shapes=[[(1, 4, 6)]] * d.batch),
        static="img_shapes is a list of one entry per sample",
    ),
    _case(
        "auraflow", "mmdit", "AuraFlowTransformer2DModel",
        dict(_JOINT, sample_size=12, num_mmdit_layers=2, num_single_dit_layers=2, caption_projection_dim=32,
             pos_embed_max_size=64),
        lambda d: dict(hidden_states=d(4, 8, 12), encoder_hidden_states=d(7, 32), timestep=d.sigma()),
        "joint_transformer_blocks single_transformer_blocks",
    ),
    _case(
        "hunyuanimage", "mmdit", "HunyuanImageTransformer2DModel", dict(_HUNYUAN, rope_axes_dim=(8, 8)),
        lambda d: dict(hidden_states=d(4, 4, 6), timestep=d.each(d.t), encoder_hidden_states=d(7, 32),
                       encoder_attention_mask=d.mask(7)),
        _TWO,
    ),
    _case(
        "cogview4", "mmdit", "CogView4Transformer2DModel",
        dict(_HEADS, **_LATENT, num_layers=3, text_embed_dim=32, time_embed_dim=32, condition_dim=8,
             pos_embed_max_size=8, sample_size=12),
        lambda d: dict(hidden_states=d(4, 8, 12), encoder_hidden_states=d(7, 32), timestep=d.step(),
                       original_size=d.same(64.0, 96.0), target_size=d.same(64.0, 96.0), crop_coords=d.same(0.0, 0.0)),
    ),
    _case(  # Caches its RoPE tables at its first forward: exported before any, it is left with fake tensors there.
        "zimage", "mmdit", "ZImageTransformer2DModel",
        dict(in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
             axes_dims=(4, 4, 8), axes_lens=(128, 16, 16)),
        lambda d: dict(x=list(d(4, 1, 8, 12)), t=d.sigma(), cap_feats=list(d(7, 32))),
        "noise_refiner context_refiner layers", static="x and cap_feats are lists of one tensor per sample",
    ),
    # Transformers without text, or with cross-attention to it.
    _case(
        "dit", "dit", "DiTTransformer2DModel",
        dict(_HEADS, num_layers=3, out_channels=8, sample_size=8, num_embeds_ada_norm=10),
        lambda d: dict(hidden_states=d(4, 8, 8), timestep=d.step(), class_labels=torch.arange(d.batch) + d.seed % 5),
    ),
    _case(
        "pixart", "dit-cross", "PixArtTransformer2DModel",
        dict(num_attention_heads=3, attention_head_dim=16, num_layers=3, cross_attention_dim=48, sample_size=12,
             caption_channels=32, use_additional_conditions=True),
        lambda d: dict(hidden_states=d(4, 8, 12), encoder_hidden_states=d(7, 32), timestep=d.step(),
                       encoder_attention_mask=d.mask(7),
                       added_cond_kwargs=dict(resolution=d.same(64.0, 96.0), aspect_ratio=d.same(0.67))),
    ),
    _case(
        "sana", "dit-cross", "SanaTransformer2DModel",
        dict(_HEADS, **_LATENT, num_layers=3, num_cross_attention_heads=2, cross_attention_head_dim=16,
             cross_attention_dim=32, caption_channels=32, sample_size=8),
        lambda d: dict(hidden_states=d(4, 4, 6), encoder_hidden_states=d(7, 32), timestep=d.step(),
                       encoder_attention_mask=d.mask(7, torch.long)),
    ),
    _case(
        "hunyuandit", "dit-cross", "HunyuanDiT2DModel",
        dict(_HEADS, in_channels=4, patch_size=2, sample_size=8, hidden_size=32, num_layers=4, cross_attention_dim=32,
             cross_attention_dim_t5=32, pooled_projection_dim=16, text_len=7, text_len_t5=5),
        lambda d: dict(hidden_states=d(4, 8, 12), timestep=d.each(d.t), encoder_hidden_states=d(7, 32),
                       text_embedding_mask=d.mask(7, torch.long), encoder_hidden_states_t5=d(5, 32),
                       text_embedding_mask_t5=d.mask(5, torch.long), style=d.each(0, torch.long),
                       image_meta_size=d.same(64.0, 96.0, 64.0, 96.0, 0.0, 0.0),
                       image_rotary_emb=embeddings.get_2d_rotary_pos_embed(16, ((0, 0), (4, 6)), (4, 6))),
        "blocks",
    ),
    # U-Nets.
    _case(
        "unet-sd", "unet", "UNet2DConditionModel", dict(_UNET, attention_head_dim=8),
        lambda d: dict(sample=d(4, 8, 12), timestep=d.scalar(), encoder_hidden_states=d(7, 32)),
        _UNET_BLOCKS,
    ),
    _case(
        "unet-sdxl", "unet", "UNet2DConditionModel",
        dict(_UNET, attention_head_dim=8, transformer_layers_per_block=(2, 1), use_linear_projection=True,
             addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80),
        lambda d: dict(sample=d(4, 8, 12), timestep=d.scalar(), encoder_hidden_states=d(7, 32),
                       added_cond_kwargs=dict(text_embeds=d(32), time_ids=d.same(64.0, 96.0, 0.0, 0.0, 64.0, 96.0))),
        _UNET_BLOCKS,
    ),
    _case(
        "unet2d", "unet", "UNet2DModel",
        dict(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
             down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        lambda d: dict(sample=d(3, 8, 12), timestep=d.scalar()),
        _UNET_BLOCKS,
    ),
    _case(
        "stable-cascade", "unet", "StableCascadeUNet",
        dict(_LATENT, timestep_ratio_embedding_dim=16, conditioning_dim=32, block_out_channels=(16, 32),
             num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
             clip_text_pooled_in_channels=32, switch_level=(False,)),
        lambda d: dict(sample=d(4, 8, 12), timestep_ratio=d.sigma(), clip_text_pooled=d(1, 32)),
        "down_blocks up_blocks",
    ),
    # Video.
    _case(
        "unet-motion", "video", "UNetMotionModel",
        dict(_UNET, num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=8,
             down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
             up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion")),
        lambda d: dict(sample=d(4, 3, 8, 12), timestep=d.scalar(),
                       encoder_hidden_states=d(7, 32).repeat_interleave(3, dim=0)),  # (batch * frames, ...)
        _UNET_BLOCKS,
    ),
    _case(
        "wan", "video", "WanTransformer3DModel",
        dict(_HEADS, **_LATENT, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=3, rope_max_seq_len=32),
        lambda d: dict(hidden_states=d(4, 3, 8, 12), timestep=d.step(), encoder_hidden_states=d(7, 32)),
        "blocks",
    ),
    _case(
        "hunyuanvideo", "video", "HunyuanVideoTransformer3DModel",
        dict(_HUNYUAN, pooled_projection_dim=32, rope_axes_dim=(4, 4, 8)),
        lambda d: dict(hidden_states=d(4, 3, 8, 12), timestep=d.step(), encoder_hidden_states=d(7, 32),
                       encoder_attention_mask=d.mask(7), pooled_projections=d(32), guidance=d.each(6000.0)),
        _TWO,
    ),
    _case(
        "ltx", "video", "LTXVideoTransformer3DModel",
        dict(_HEADS, **_LATENT, cross_attention_dim=32, num_layers=3, caption_channels=32),
        lambda d: dict(hidden_states=d(72, 4), encoder_hidden_states=d(7, 32), timestep=d.step(),
                       encoder_attention_mask=d.mask(7), num_frames=3, height=4, width=6,
                       rope_interpolation_scale=(1 / 25, 32, 32)),
    ),
    _case(
        "cogvideox", "video", "CogVideoXTransformer3DModel",
        dict(_HEADS, **_LATENT, time_embed_dim=32, text_embed_dim=32, num_layers=3, sample_width=12, sample_height=8,
             sample_frames=9, max_text_seq_length=7, use_rotary_positional_embeddings=True),
        lambda d: dict(hidden_states=d(3, 4, 8, 12), encoder_hidden_states=d(7, 32), timestep=d.step(),
                       image_rotary_emb=embeddings.get_3d_rotary_pos_embed(16, ((0, 0), (4, 6)), (4, 6), 3)),
    ),
    _case(
        "mochi", "video", "MochiTransformer3DModel",
        dict(_HEADS, in_channels=4, num_layers=3, pooled_projection_dim=32, text_embed_dim=32, time_embed_dim=32,
             max_sequence_length=7),
        lambda d: dict(hidden_states=d(4, 3, 8, 12), encoder_hidden_states=d(7, 32), timestep=d.step(),
                       encoder_attention_mask=d.mask(7)),
        static="its attention loops over the samples in Python", warns="In CPU autocast",
    ),
    _case(
        "latte", "video", "LatteTransformer3DModel",
        dict(_HEADS, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32, attention_bias=True,
             sample_size=12, patch_size=2, activation_fn="gelu-approximate", norm_type="ada_norm_single",
             norm_elementwise_affine=False, caption_channels=32, video_length=3),
        lambda d: dict(hidden_states=d(4, 3, 8, 12), timestep=d.step(), encoder_hidden_states=d(7, 32)),
        "transformer_blocks temporal_transformer_blocks",
    ),
    _case(
        "allegro", "video", "AllegroTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=24, num_layers=3, cross_attention_dim=48, sample_height=8,
             sample_width=12, sample_frames=3, caption_channels=32),
        lambda d: dict(hidden_states=d(4, 3, 8, 12), encoder_hidden_states=d(7, 32), timestep=d.step(),
                       attention_mask=torch.ones(d.batch, 3, 8, 12), encoder_attention_mask=d.mask(7),
                       image_rotary_emb=_allegro_rope(24, 3, 4, 6)),
    ),
    _case(
        "cosmos", "video", "CosmosTransformer3DModel",
        dict(_HEADS, **_LATENT, num_layers=3, text_embed_dim=32, adaln_lora_dim=8, max_size=(4, 16, 16),
             concat_padding_mask=False),
        lambda d: dict(hidden_states=d(4, 3, 8, 12), timestep=d.step(), encoder_hidden_states=d(7, 32), fps=24),
        static="its positional embedding takes numpy's sqrt of a size",
    ),
    _case(
        "kandinsky5", "video", "Kandinsky5Transformer3DModel",
        dict(in_text_dim=32, in_text_dim2=32, time_dim=32, model_dim=32, ff_dim=64, num_text_blocks=1,
             num_visual_blocks=2, axes_dims=(4, 4, 8)),
        lambda d: dict(hidden_states=d(3, 8, 12, 4), encoder_hidden_states=d(7, 32), timestep=d.step(),
                       pooled_projections=d(32), visual_rope_pos=[torch.arange(n) for n in (3, 4, 6)],
                       text_rope_pos=torch.arange(7)),
        "text_transformer_blocks visual_transformer_blocks",
    ),
    # Audio.
    _case(
        "stable-audio", "audio", "StableAudioDiTModel",
        dict(_HEADS, **_LATENT, sample_size=24, num_layers=3, num_key_value_attention_heads=2, cross_attention_dim=32,
             time_proj_dim=32, global_states_input_dim=32, cross_attention_input_dim=32),
        lambda d: dict(hidden_states=d(4, 24), timestep=torch.tensor([d.t * 1e-3]),  # (1,) whatever the batch
                       encoder_hidden_states=d(7, 32), global_hidden_states=d(1, 32),
                       rotary_embedding=embeddings.get_1d_rotary_pos_embed(8, 25, 1e4, True, 1.0, 1.0, False)),
    ),
    _case(
        "audioldm2", "audio", "AudioLDM2UNet2DConditionModel",
        _UNET | dict(attention_head_dim=8, cross_attention_dim=((None, 32), (None, 32))),
        lambda d: dict(sample=d(4, 8, 12), timestep=d.scalar(), encoder_hidden_states=d(7, 32),
                       encoder_hidden_states_1=d(5, 32), encoder_attention_mask_1=d.mask(5)),
        _UNET_BLOCKS,
    ),
    _case(
        "acestep", "audio", "AceStepTransformer1DModel",
        dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             head_dim=16, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4),
        lambda d: dict(hidden_states=d(24, 4), timestep=d.sigma(), timestep_r=d.sigma(),
                       encoder_hidden_states=d(7, 32), context_latents=d(24, 8)),
        "layers",
    ),
)
# fmt: on
