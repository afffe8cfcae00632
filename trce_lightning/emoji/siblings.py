"""Build and open the embedded model's siblings: small pipelines of SDXL, SD3 and FLUX on the same pictures.

A sibling shares the embedded model's autoencoder, first text encoder, tokenizer and judge. Its own parts
ship in 8 bits. Its blocks share the weights of their modulation. :func:`assembled` gives every block a copy,
so the pipeline is a plain one of diffusers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from trce_lightning.emoji.eight_bits import packed, unpacked
from trce_lightning.emoji.package import INSTALL_AGAIN, weights_folder
from trce_lightning.errors import InputError
from trce_lightning.runtime.storage import read_safetensors, replacing_folder, write_safetensors

Family = Literal["xl", "sd3", "flux"]
FAMILIES: tuple[Family, ...] = get_args(Family)
ENCODERS: dict[Family, tuple[str, ...]] = {"xl": ("clip_2",), "sd3": ("clip_2", "t5"), "flux": ("t5_flux",)}
"""The text encoders of each sibling beside the embedded model's.

FLUX has a T5 of its own, which tells left from right. SD3 reads that from CLIP's states.
"""
RESOLUTION = 64
TEXT_LENGTH = 32
"""The number of positions of each text encoder."""
CLIP_WIDTH, CLIP_2_WIDTH = 256, 64
T5_WIDTH, T5_VOCABULARY = CLIP_WIDTH + CLIP_2_WIDTH, 1024
WIDTH = 128
"""The width of the transformers."""
XL_SIZE_WIDTH = 8
"""The width of the embedding of each of SDXL's six size ids."""


def build_clip_2(vocabulary: int, end: int) -> CLIPTextModelWithProjection:
    """Return the second CLIP text encoder. It pads with token 0, which is "!", as SDXL's does."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=CLIP_2_WIDTH,
            intermediate_size=4 * CLIP_2_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=CLIP_2_WIDTH,
            hidden_act="gelu",
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=0,
        )
    )


def build_t5() -> T5EncoderModel:
    """Return the T5 encoder. Its embeddings begin ten times smaller than T5's, so they learn faster."""
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=T5_VOCABULARY,
            d_model=T5_WIDTH,
            d_kv=24,
            d_ff=192,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    encoder.shared.weight.data.mul_(0.1)
    return encoder


def build_xl() -> UNet2DConditionModel:
    """Return a U-Net like the embedded model's, narrower, with SDXL's sizes and pooled text."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64, 80),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CLIP_WIDTH + CLIP_2_WIDTH,
        attention_head_dim=(2, 4, 5),  # the numbers of heads, in spite of the name
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=XL_SIZE_WIDTH,
        projection_class_embeddings_input_dim=CLIP_2_WIDTH + 6 * XL_SIZE_WIDTH,
    )


def build_sd3() -> SD3Transformer2DModel:
    """Return six joint blocks with normalised queries and keys."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=CLIP_WIDTH + CLIP_2_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def build_flux() -> FluxTransformer2DModel:
    """Return two double and six single blocks that read the guidance scale, as FLUX.1 dev does."""
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


_BUILDERS: dict[Family, Callable[[], Any]] = {"xl": build_xl, "sd3": build_sd3, "flux": build_flux}


def build(family: Family) -> nn.Module:
    """Return a sibling's untrained denoiser, whose blocks share the weights of their modulation.

    They keep biases of their own. The U-Net has no such weights.
    """
    network = _BUILDERS[family]()
    for modulations in _modulations(network):
        first = modulations[0]
        for other in modulations[1:]:
            if other.weight.shape == first.weight.shape:
                other.weight = first.weight
    return network


def _modulations(network: nn.Module) -> list[list[nn.Linear]]:
    """Return the modulations' linear layers of the blocks, in lists of one kind each."""
    joint = list(getattr(network, "transformer_blocks", []))
    single = list(getattr(network, "single_transformer_blocks", []))
    kinds = [
        [block.norm1.linear for block in joint],
        [block.norm1_context.linear for block in joint],
        [block.norm.linear for block in single],
    ]
    return [layers for layers in kinds if layers]


def assembled(family: Family, network: nn.Module) -> nn.Module:
    """Return a denoiser with the values of ``network`` in which no layers share a weight."""
    plain = _BUILDERS[family]()
    plain.load_state_dict({name: tensor.clone() for name, tensor in network.state_dict().items()})
    return plain.eval()


def clip_with_projection(folder: Path) -> CLIPTextModelWithProjection:
    """Return the embedded model's text encoder with its projection, as SD3 reads it."""
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    encoder = CLIPTextModelWithProjection(text.config)
    # Earlier versions of transformers have one more level.
    encoder.text_model.load_state_dict(getattr(text, "text_model", text).state_dict())
    rest = read_safetensors(folder / "clip" / "vision.safetensors", "CLIP's projection", INSTALL_AGAIN)
    encoder.text_projection.weight.data.copy_(rest["text_projection.weight"])
    return encoder.eval()


def second_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return the tokenizer of the second CLIP: the first one's, padded with "!" (token 0)."""
    return CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!")


def xl_scheduler() -> EulerDiscreteScheduler:
    """Return SDXL's scheduler."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def pipeline_of(family: Family, network: nn.Module, folder: Path) -> DiffusionPipeline:
    """Return the pipeline of a sibling's denoiser, the text encoders in ``folder`` and the embedded parts."""
    parts = folder
    folder = weights_folder()
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    t5, t5_tokenizer, clip_2 = None, None, None
    if family != "xl":
        t5 = load_part(build_t5(), part_file(parts, ENCODERS[family][-1]))
        t5_tokenizer = load_t5_tokenizer(parts)
    if family != "flux":
        clip_2 = load_part(build_clip_2(len(tokenizer), tokenizer.eos_token_id), part_file(parts, "clip_2"))
    if family == "xl":
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
            text_encoder_2=clip_2,
            tokenizer=tokenizer,
            tokenizer_2=second_tokenizer(folder),
            unet=network,
            scheduler=xl_scheduler(),
            add_watermarker=False,
        )
    vae.register_to_config(shift_factor=0.0)
    if family == "sd3":
        return StableDiffusion3Pipeline(
            transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=clip_with_projection(folder),
            tokenizer=tokenizer,
            text_encoder_2=clip_2,
            tokenizer_2=second_tokenizer(folder),
            text_encoder_3=t5,
            tokenizer_3=t5_tokenizer,
        )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=network,
    )


def siblings_folder() -> Path:
    """Return the folder of the siblings' own parts that ship with the package."""
    return weights_folder() / "siblings"


def part_file(folder: Path, name: str) -> Path:
    """Return the file of a part: ``clip_2``, ``t5``, ``t5_flux`` or a family's denoiser."""
    return folder / f"{name}.safetensors"


def t5_tokenizer_folder(folder: Path) -> Path:
    """Return the folder of T5's tokenizer."""
    return folder / "tokenizer_3"


def load_t5_tokenizer(folder: Path) -> T5Tokenizer:
    """Return T5's tokenizer."""
    return T5Tokenizer.from_pretrained(t5_tokenizer_folder(folder))


def open_sibling(family: Family, folder: Path) -> DiffusionPipeline:
    """Return a sibling's pipeline from the parts in ``folder``, in float32."""
    network = assembled(family, load_part(build(family), part_file(folder, family)))
    return pipeline_of(family, network, folder)


def opened_folder(family: Family) -> Path:
    """Return the folder of a sibling's plain pipeline in float16, which any copy of diffusers opens.

    It is assembled once from the parts that ship, and kept in the user's cache (``XDG_CACHE_HOME``, else
    ``~/.cache``). ``InputError`` if the parts don't ship.
    """
    shipped = siblings_folder()
    files = [part_file(shipped, name) for name in (*ENCODERS[family], family)]
    if missing := [file.name for file in files if not file.exists()]:
        raise InputError(
            f"model=emoji_{family}: expected {', '.join(missing)} in '{shipped}', got none; the embedded "
            f"model's card says how --family {family} trains it"
        )
    digest = hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "trce_lightning" / f"emoji_{family}-{digest}"
    if not (folder / "model_index.json").exists():
        with replacing_folder(folder) as aside:
            open_sibling(family, shipped).to(torch.float16).save_pretrained(aside)
    return folder


def save_part(network: nn.Module, file: Path) -> None:
    """Write a part's parameters in 8 bits. A weight that layers share is stored once, and buffers are not."""
    write_safetensors(file, packed({name: value.detach() for name, value in network.named_parameters()}))


@torch.no_grad()
def load_part(network: nn.Module, file: Path) -> nn.Module:
    """Fill ``network`` with what :func:`save_part` wrote, in float32, and return it."""
    stored = unpacked(read_safetensors(file, "a part of a sibling", INSTALL_AGAIN))
    parameters: dict[str, Tensor] = dict(network.named_parameters())
    assert stored.keys() == parameters.keys()
    for name, value in parameters.items():
        value.copy_(stored[name])
    return network.eval()
