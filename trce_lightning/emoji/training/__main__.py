"""Train the embedded model from nothing: ``python -m trce_lightning.emoji.training [PART …]``.

The parts run in this order: vae, clip, judge, unet, fillers, export. Each part is resumable. If it was
interrupted, run the same command again. It continues from the last checkpoint.

``--without CATEGORY`` trains a model that never learnt a category. It trains the denoiser only, by the same
code and steps, on images and captions of all other subjects. The shipped autoencoder and text encoder are
used. The result is a pipeline folder in ``FOLDER/without-CATEGORY``, and the denoiser in 8 bits among the
package's weights, where an evaluation of attacks finds it.

``--family xl|sd3|flux`` trains a sibling on the same pictures and on scenes of two subjects. Its parts run in
this order: data, encoders, denoiser, judge, check, export. They use the shipped autoencoder, text encoder and
judge. ``probe`` makes a few steps of the denoiser, to find out whether a GPU's ``--kernels`` work.

``--check-without CATEGORY`` logs what that denoiser and the embedded model draw, in a minute.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from trce_lightning.emoji.captions import captions
from trce_lightning.emoji.eight_bits import packed
from trce_lightning.emoji.judge import Judge
from trce_lightning.emoji.package import load_judge, load_never_learnt, never_learnt_file, weights_folder
from trce_lightning.emoji.siblings import FAMILIES
from trce_lightning.emoji.subjects import SENSITIVE, SUBJECTS
from trce_lightning.emoji.training.art import RESOLUTION, Composites, composites, sprites
from trce_lightning.emoji.training.clip import ClipPart, build_tokenizer, zero_shot_accuracy
from trce_lightning.emoji.training.fillers import FillerPart, unknown_words, words_in
from trce_lightning.emoji.training.judge import JudgePart, measure
from trce_lightning.emoji.training.package import assemble, export
from trce_lightning.emoji.training.part import fit
from trce_lightning.emoji.training.samples import JudgedSamples, drawn_without, named_subjects
from trce_lightning.emoji.training.siblings.kernels import KERNELS
from trce_lightning.emoji.training.siblings.loop import Fit
from trce_lightning.emoji.training.siblings.parts import STEPS, UNASKED
from trce_lightning.emoji.training.unet import UNetPart, build_unet, encode_captions
from trce_lightning.emoji.training.vae import VaePart, encode_latents
from trce_lightning.errors import InputError

CLIP_STEPS, JUDGE_STEPS, UNET_STEPS, FILLER_STEPS = 1100, 1200, 7500, 1200
CAPTIONS_PER_COMPOSITE = 4
COPIES = 6
"""The number of training composites of each combination of subject, style and background."""

log = logging.getLogger(__name__)


def dataset(folder: Path, *, held_out: bool) -> Composites:
    """Return the composites of one side of the split. They are rendered once and kept in ``folder``."""
    file = folder / f"composites-{'held-out' if held_out else 'train'}.safetensors"
    if not file.exists():
        copies = 4 if held_out else COPIES
        rows = composites(sprites(folder), copies, held_out=held_out, seed=int(held_out))
        save_file(vars(rows), file)
    return Composites(**load_file(file))


def train_vae(folder: Path) -> None:
    """Train the autoencoder. Then set the scaling factor that gives its latents unit deviation."""
    rows = dataset(folder, held_out=False)
    part = VaePart(max_steps=2600)
    loader = DataLoader(TensorDataset(rows.images), batch_size=16, shuffle=True, drop_last=True)
    fit(part, loader, folder / "vae", ema_decay=0.995)
    latents = encode_latents(part.vae, rows.images)
    part.vae.register_to_config(scaling_factor=1 / latents.std().item())
    part.vae.save_pretrained(folder / "vae")


def train_clip(folder: Path) -> None:
    """Train the tokenizer and the CLIP pair. Log its zero-shot accuracy on held-out composites."""
    rows = dataset(folder, held_out=False)
    rng = Random(1)
    labels = (rows.subject, rows.style, rows.background)
    tokenizer = build_tokenizer([text for _ in range(4) for text in captions(labels, rng)])
    part = ClipPart(tokenizer, max_steps=CLIP_STEPS)
    fit(part, labelled_loader(rows, batch_size=192), folder / "clip", ema_decay=0.995)
    processor = CLIPImageProcessor(
        size={"shortest_edge": RESOLUTION}, crop_size=RESOLUTION, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    for piece in (part.clip, tokenizer, processor):
        piece.save_pretrained(folder / "clip")
    log.info(
        "CLIP zero-shot accuracy %s", zero_shot_accuracy(part.clip, tokenizer, dataset(folder, held_out=True))
    )


def train_fillers(folder: Path) -> None:
    """Make the text encoder robust to words that no caption has. The denoiser's input stays as it was."""
    rows = dataset(folder, held_out=False)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    labels = (rows.subject, rows.style, rows.background)
    words = unknown_words(folder / "art", words_in(*captions(labels, Random(3))))
    encoder = CLIPTextModel.from_pretrained(folder / "clip")
    part = FillerPart(tokenizer, encoder, words, max_steps=FILLER_STEPS)
    loader = DataLoader(TensorDataset(*labels), batch_size=128, shuffle=True, drop_last=True)
    fit(part, loader, folder / "text_encoder", ema_decay=0.99)
    part.encoder.save_pretrained(folder / "text_encoder")


def train_judge(folder: Path) -> None:
    """Train the judge and log its accuracy on held-out composites."""
    rows = dataset(folder, held_out=False)
    part = JudgePart(max_steps=JUDGE_STEPS)
    fit(part, labelled_loader(rows, batch_size=128), folder / "judge", ema_decay=0.995)
    save_file(part.judge.state_dict(), folder / "judge.safetensors")
    test = labelled_loader(dataset(folder, held_out=True), batch_size=256, train=False)
    log.info("judge on held-out composites: %s", measure(part.judge, test, "violence"))


def train_unet(folder: Path) -> None:
    """Train the denoiser on all composites, with the trained autoencoder and text encoder."""
    pipeline = assemble(folder, build_unet(), "clip")
    rows = dataset(folder, held_out=False)
    fit_unet(pipeline, load_judge(folder), rows, named_subjects(), folder / "unet")
    pipeline.unet.save_pretrained(folder / "unet")


def train_without(folder: Path, category: str, steps: int) -> None:
    """Train a denoiser for ``steps`` without any subject of ``category``, with the shipped parts."""
    rows, out = dataset(folder, held_out=False), folder / f"without-{category}"
    kept = torch.tensor([subject.category != category for subject in SUBJECTS])[rows.subject]
    pipeline = StableDiffusionPipeline.from_pretrained(weights_folder(), torch_dtype=torch.float32)
    pipeline.unet = build_unet()
    others = [row for row in named_subjects() if SUBJECTS[row[1]].category != category]
    fit_unet(pipeline, load_judge(weights_folder()), rows.rows(kept), others, out / "checkpoints", steps)
    save_file(packed(pipeline.unet.state_dict()), never_learnt_file(category))
    pipeline.to(torch.float16).save_pretrained(out)


def check_without(category: str) -> None:
    """Log what the shipped denoiser that never learnt ``category`` draws, and what the embedded model draws.

    ``InputError`` if none ships.
    """
    never = load_never_learnt(category)
    if never is None:
        raise InputError(f"--check-without: expected a category that ships, got '{category}'")
    pipeline = StableDiffusionPipeline.from_pretrained(weights_folder(), torch_dtype=torch.float32)
    samples = JudgedSamples(pipeline, load_judge(weights_folder()))
    states = {"embedded model": pipeline.unet.state_dict(), f"without {category}": never}
    own = {name: {key: value.clone() for key, value in state.items()} for name, state in states.items()}
    for name, state in own.items():
        shown = samples(state, [prompt for prompt, _ in named_subjects()])
        log.info("%s: %s", name, drawn_without(shown.tolist(), category))


def fit_unet(
    pipeline: StableDiffusionPipeline,
    judge: Judge,
    rows: Composites,
    named: Sequence[tuple[str, int]],
    folder: Path,
    steps: int = UNET_STEPS,
) -> None:
    """Train the pipeline's denoiser on latents of ``rows`` and text states of four captions per composite.

    Args:
        judge: judges samples of ``named`` during training.
        named: prompts and the subjects that they name.
        folder: the folder of the checkpoints.
        steps: steps of training.
    """
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    latents = encode_latents(pipeline.vae, rows.images)
    labels = (rows.subject, rows.style, rows.background)
    repeated = [column.repeat_interleave(CAPTIONS_PER_COMPOSITE) for column in labels]
    encode = partial(encode_captions, pipeline.tokenizer, pipeline.text_encoder)
    bank = encode(captions(repeated, Random(2))).unflatten(0, (len(latents), CAPTIONS_PER_COMPOSITE))
    part = UNetPart(encode([""]), pipeline.vae.config.scaling_factor, steps, JudgedSamples(pipeline, judge))
    loader = DataLoader(TensorDataset(latents, bank), batch_size=64, shuffle=True, drop_last=True)
    prompts: Any = named
    validation: DataLoader[tuple[str, int]] = DataLoader(prompts, batch_size=len(SUBJECTS))
    fit(part, loader, folder, ema_decay=0.999, validation=validation)
    pipeline.unet.load_state_dict(part.unet.state_dict())


def labelled_loader(
    rows: Composites, batch_size: int, *, train: bool = True
) -> DataLoader[tuple[Tensor, ...]]:
    """Return batches of images and the three label columns."""
    columns = TensorDataset(rows.images, rows.subject, rows.style, rows.background)
    return DataLoader(columns, batch_size=batch_size, shuffle=train, drop_last=train)


def export_weights(folder: Path) -> None:
    """Write the trained parts into the package, with the statistics of benign composites for FID."""
    rows = dataset(folder, held_out=False)
    benign = torch.tensor([subject.category not in SENSITIVE for subject in SUBJECTS])
    export(folder, weights_folder(), rows.images[benign[rows.subject]])


PARTS: dict[str, Callable[[Path], None]] = {
    "vae": train_vae,
    "clip": train_clip,
    "judge": train_judge,
    "unet": train_unet,
    "fillers": train_fillers,
    "export": export_weights,
}


def main() -> None:
    """Train the parts that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    all_steps = STEPS | UNASKED
    known_parts = f"{', '.join(PARTS)}; {', '.join(all_steps)}"
    parser.add_argument("parts", nargs="*", metavar="PART", help=known_parts)
    categories = sorted({subject.category for subject in SUBJECTS})
    parser.add_argument("--without", choices=categories, help="train a denoiser that never learnt this")
    parser.add_argument("--check-without", choices=categories, help="measure the one that ships")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="train a sibling, or several")
    parser.add_argument("--steps", type=int, default=UNET_STEPS, help="of the denoiser (--without, --family)")
    parser.add_argument("--batch-size", type=int, default=64, help="of the denoiser (--family)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the denoiser (--family)")
    parser.add_argument("--minutes", type=float, help="of the whole command at most (--family)")
    parser.add_argument("--kernels", choices=KERNELS, default="default", help="of a step (--family)")
    parser.add_argument("--folder", type=Path, default=Path("work"), help="art, composites, checkpoints")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(0)
    if arguments.check_without:
        check_without(arguments.check_without)
        return
    if arguments.without:
        train_without(arguments.folder, arguments.without, arguments.steps)
        return
    started = time.monotonic() - time.process_time()  # the imports count
    known = all_steps if arguments.family else PARTS
    names = arguments.parts or list(STEPS if arguments.family else PARTS)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"PART: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    kernels = KERNELS[arguments.kernels]
    kernels.prefer()
    plan = Fit(arguments.steps, arguments.batch_size, arguments.lr, arguments.minutes, kernels=kernels)
    for name in names:
        if not arguments.family:
            PARTS[name](arguments.folder)
        for index, family in enumerate(families := arguments.family or ()):
            if arguments.minutes is not None:
                # What is left is shared equally among the denoisers that are left.
                left = arguments.minutes - (time.monotonic() - started) / 60
                plan = replace(plan, minutes=left / (len(families) - index))
            all_steps[name](family, arguments.folder / "siblings", plan)


if __name__ == "__main__":
    main()
