"""A Stable Diffusion XL of random weights that is small enough for every test."""

import torch
from conftest import MAX_LENGTH, build_scheduler, build_tiny_tokenizer, build_tiny_vae, tiny_text_config
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trce_lightning.emoji.training.clip import tokenizer_of

WIDTHS = (32, 48)
"""The widths of the two encoders' states."""
POOLED = 24
"""The width of the pooled text."""
SIZE_WIDTH = 8
"""The width of one size as the denoiser reads it."""


def build_tiny_sdxl(
    prediction_type: str = "epsilon",
    *,
    force_zeros: bool = True,
    widths: tuple[int, int] = WIDTHS,
    pooled: int = POOLED,
) -> StableDiffusionXLPipeline:
    """A pipeline for 16×16 pixels, the same random weights each time. The second tokenizer pads with "!"."""
    first = build_tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        text_encoder = CLIPTextModel(tiny_text_config(first, widths[0]))
        text_encoder_2 = CLIPTextModelWithProjection(
            tiny_text_config(first, widths[1], projection_dim=pooled)
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=sum(widths),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=SIZE_WIDTH,
            projection_class_embeddings_input_dim=pooled + 6 * SIZE_WIDTH,
        )
        # At its initial size the prediction hardly depends on the prompt, and tests could not tell.
        unet.conv_out.weight.data *= 4
        vae = build_tiny_vae(scaling_factor=0.13025, force_upcast=True)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=first,
        tokenizer_2=build_second_tokenizer(),
        unet=unet,
        scheduler=build_scheduler(prediction_type),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_second_tokenizer() -> CLIPTokenizer:
    """The first one's vocabulary, padded with "!" as in OpenCLIP.

    A special token never joins its neighbours, so both tokenizers read "!" as other tokens.
    """
    ids = build_tiny_tokenizer().get_vocab()
    return tokenizer_of(sorted(ids, key=lambda token: ids[token])[:-2], [], MAX_LENGTH, pad_token="!")
