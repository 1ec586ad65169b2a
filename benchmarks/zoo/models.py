"""The parts of the two pipelines, all stock classes, all small."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from scenes import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

TOKENS = 16
PAD, END, UNKNOWN = 0, 1, 3  # CLIP's pooling treats an end token of 2 as a historic special case
CLIP_WIDTH = 128
T5_WIDTH = 128


def tokenizer():
    """Word-level: (batch,) captions -> (batch, 16) ids, closed by the end token and padded."""
    vocabulary = {"<pad>": PAD, "<end>": END, "<start>": 2, "<unknown>": UNKNOWN}
    vocabulary |= {word: index for index, word in enumerate(WORDS, len(vocabulary))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unknown>",
        model_max_length=TOKENS,
    )


def vae():
    """(batch, 3, 64, 64) pixels <-> (batch, 4, 16, 16) latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip(layers):
    """(batch, 16) ids -> states (batch, 16, 128) and, at the end token, pooled (batch, 128)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS) + 4,
            hidden_size=CLIP_WIDTH,
            intermediate_size=4 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            pad_token_id=PAD,
            bos_token_id=2,
            eos_token_id=END,
        )
    )


def t5():
    """(batch, 16) ids -> states (batch, 16, 128)."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(WORDS) + 4,
            d_model=T5_WIDTH,
            d_kv=32,
            d_ff=4 * T5_WIDTH,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=16,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=PAD,
        )
    )


def transformer():
    """Flux: 3 double and 5 single blocks of width 160 on 64 image tokens of 16 channels."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def unet():
    """(batch, 4, 16, 16) latents at three resolutions (16, 8, 4), cross attention at the lower two."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(40, 80, 112),
        layers_per_block=2,
        cross_attention_dim=CLIP_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def flow_scheduler():
    return FlowMatchEulerDiscreteScheduler(shift=1.6)


def ddim_scheduler():
    """Linear betas end at almost no signal, so plain backgrounds do not leak into the initial noise."""
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def parts(name, autoencoder=None):
    """The components of the pipeline "mmdit" or "unet"; random weights apart from `autoencoder`."""
    torch.manual_seed(0)
    shared = {"vae": autoencoder or vae()}
    if name == "mmdit":
        return shared | {
            "transformer": transformer(),
            "text_encoder": clip(1),
            "text_encoder_2": t5(),
            "tokenizer": tokenizer(),
            "tokenizer_2": tokenizer(),
            "scheduler": flow_scheduler(),
        }
    return shared | {
        "unet": unet(),
        "text_encoder": clip(3),
        "tokenizer": tokenizer(),
        "scheduler": ddim_scheduler(),
    }


def pipeline(name, components):
    """The stock pipeline of these components."""
    if name == "mmdit":
        return FluxPipeline(**components)
    return StableDiffusionPipeline(
        **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


TRAINED = {"mmdit": ("transformer", "text_encoder", "text_encoder_2"), "unet": ("unet", "text_encoder")}
# How the pipelines are meant to be called.
CALL = {
    "mmdit": {"height": 64, "width": 64, "num_inference_steps": 28, "max_sequence_length": TOKENS},
    "unet": {"height": 64, "width": 64, "num_inference_steps": 50, "guidance_scale": 3.0},
}
