"""Train a sibling part by part. Each part is resumable, and is skipped if it is done."""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.utils import save_image
from transformers import CLIPTokenizer

from trce_lightning.cli import config_folder
from trce_lightning.concepts import load_concept
from trce_lightning.emoji.package import load_judge, weights_folder
from trce_lightning.emoji.siblings import (
    ENCODERS,
    FAMILIES,
    Family,
    build,
    build_clip_2,
    build_t5,
    load_t5_tokenizer,
    open_sibling,
    part_file,
    pipeline_of,
    save_part,
    siblings_folder,
    t5_tokenizer_folder,
)
from trce_lightning.emoji.training.siblings.data import Bank, prepare, prepare_captions, random_bank
from trce_lightning.emoji.training.siblings.denoisers import Drawing, Texts, initialise, loss_of, second_ids
from trce_lightning.emoji.training.siblings.encoders import (
    ReadOuts,
    look_back_and_ahead,
    subject_words,
)
from trce_lightning.emoji.training.siblings.judging import fit_scene_judge
from trce_lightning.emoji.training.siblings.loop import Batch, Fit, cast_parameters, fit
from trce_lightning.emoji.training.siblings.quality import quality
from trce_lightning.errors import InputError
from trce_lightning.runtime.storage import replacing, write_safetensors

GUIDED_SHARE = 0.3
"""The share of FLUX's training in which it learns guidance from itself."""
CONCEPT = "violence"
"""The concept whose prompts measure a sibling."""
PROBED_STEPS, PROBED_ROWS = 24, 512
"""The steps and the pictures by which a probe finds out whether a device can train."""
CHECKED_CAPTIONS = 4096
CHECKED_PROMPTS = 128
"""The prompts of each set that measure it."""
ENCODER_FIT = Fit(steps=6000, batch_size=256, lr=2e-3, ema_decay=0.99, warmup_steps=100)

log = logging.getLogger(__name__)


def device() -> torch.device:
    """Return the device that trains."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare_data(folder: Path) -> None:
    """Prepare the pictures and captions."""
    prepare(folder, device())


def train_encoder(name: str, folder: Path, plan: Fit) -> None:
    """Train ``t5``, ``t5_flux`` or ``clip_2``, write it to ``folder`` and log its accuracy."""
    file = part_file(folder, name)
    if file.exists():
        return
    bank = prepare_captions(folder).to(device())
    tokenizer = CLIPTokenizer.from_pretrained(weights_folder() / "tokenizer")
    reads_t5 = name != "clip_2"
    torch.manual_seed(0)
    if name == "t5_flux":
        network = ReadOuts(look_back_and_ahead(build_t5()), subject_words(load_t5_tokenizer(folder)))
    else:
        network = ReadOuts(build_t5() if reads_t5 else build_clip_2(len(tokenizer), tokenizer.eos_token_id))

    def draw(size: int) -> Batch:
        _, labels, clip_ids, t5_ids = bank.draw(size)
        return (t5_ids if reads_t5 else second_ids(clip_ids, tokenizer.eos_token_id)), labels

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(network, ReadOuts)
        return network.loss(*batch)

    checkpoint = folder / "checkpoints" / f"{name}.safetensors"
    fitted = fit(network.to(device()), loss, draw, plan, checkpoint)
    assert isinstance(fitted, ReadOuts)
    log.info("%s on captions: %s", name, fitted.accuracy(*draw(CHECKED_CAPTIONS)))
    save_part(fitted.encoder.cpu(), file)


def train_denoiser(family: Family, folder: Path, plan: Fit) -> None:
    """Train a sibling's denoiser on what the other parts of ``folder`` are, and write it to ``folder``."""
    file = part_file(folder, family)
    if file.exists():
        return
    bank = prepare(folder, device())
    save_part(_fitted(family, folder, bank, plan, folder / "checkpoints").cpu(), file)


def probe(family: Family, folder: Path, plan: Fit) -> None:
    """Make a few steps of each phase of :func:`train_denoiser` on random rows. Raise what they raise."""
    tokenizer = CLIPTokenizer.from_pretrained(weights_folder() / "tokenizer")
    bank = random_bank(PROBED_ROWS, len(tokenizer), tokenizer.eos_token_id)
    few = replace(plan, steps=min(plan.steps, PROBED_STEPS), minutes=None)
    with tempfile.TemporaryDirectory() as checkpoints:
        average = _fitted(family, folder, bank, few, Path(checkpoints))
    if not all(value.isfinite().all() for value in average.parameters()):
        raise InputError("probe: expected finite weights, got others")


def _fitted(family: Family, folder: Path, bank: Bank, plan: Fit, checkpoints: Path) -> nn.Module:
    """Return the average of a denoiser's weights. Whatever is saved on the way lies in ``checkpoints``."""
    torch.manual_seed(FAMILIES.index(family))
    network = plan.kernels.apply(initialise(build(family)))
    if family == "xl":
        network = network.to(memory_format=torch.channels_last)
    pipeline = pipeline_of(family, network, folder).to(device())
    dtype = plan.kernels.dtype(device())
    data = Drawing(Texts(family, pipeline), bank.to(device()), pipeline.vae.config.scaling_factor, dtype)
    keep = partial(save_part, file=checkpoints / f"{family}-average.safetensors")
    if family != "flux":
        return fit(network, loss_of(family, data), data, plan, part_file(checkpoints, family), keep)
    first, second = (_share(plan, share) for share in (1 - GUIDED_SHARE, GUIDED_SHARE))
    teacher = fit(network, loss_of(family, data), data, first, part_file(checkpoints, "flux"), keep)
    student = copy.deepcopy(teacher).requires_grad_(True)
    second = replace(second, lr=second.lr / 2)
    loss = loss_of(family, data, cast_parameters(copy.deepcopy(teacher), dtype))
    return fit(student, loss, data, second, part_file(checkpoints, "flux-guided"), keep)


def _share(plan: Fit, share: float) -> Fit:
    minutes = None if plan.minutes is None else share * plan.minutes
    return replace(plan, steps=max(1, round(share * plan.steps)), minutes=minutes)


def check(family: Family, folder: Path) -> None:
    """Log what share of a sibling's pictures is right, and write some of them to ``folder``."""
    pipeline = open_sibling(family, folder).to(device())
    concept = load_concept(config_folder() / "concept" / f"{CONCEPT}.yaml")
    rates, pictures = quality(family, pipeline, load_judge(weights_folder()), concept, CHECKED_PROMPTS)
    log.info("%s: %s", family, ", ".join(f"{name} {100 * rate:.1f} %" for name, rate in rates.items()))
    shown = torch.cat([images[:16] for images in pictures.values()])
    save_image(shown / 255, folder / f"{family}.png", nrow=16)


def export(family: Family, folder: Path) -> None:
    """Copy a sibling's parts into the package, where ``model=emoji_xl`` and its like find them."""
    target = siblings_folder()
    target.mkdir(exist_ok=True)
    for name in (*ENCODERS[family], family, "scene"):
        with replacing(part_file(target, name)) as aside:
            shutil.copyfile(part_file(folder, name), aside)
    if family != "xl":
        load_t5_tokenizer(folder).save_pretrained(t5_tokenizer_folder(target))


def train_scene_judge(folder: Path) -> None:
    """Fit the read-out that tells scenes from other pictures, and log how well the judge sees scenes."""
    file = part_file(folder, "scene")
    if not file.exists():
        judge, accuracy = fit_scene_judge(folder.parent, load_judge(weights_folder()))
        write_safetensors(file, judge.scene.state_dict())
        log.info("the judge on held-out pictures: %s", {name: round(x, 4) for name, x in accuracy.items()})


def _train_encoders(family: Family, folder: Path, plan: Fit) -> None:
    for name in ENCODERS[family]:
        size = max(ENCODER_FIT.batch_size, plan.batch_size)
        train_encoder(name, folder, replace(ENCODER_FIT, batch_size=size, minutes=plan.minutes))


STEPS: dict[str, Callable[[Family, Path, Fit], None]] = {
    "data": lambda family, folder, plan: prepare_data(folder),
    "encoders": _train_encoders,
    "denoiser": train_denoiser,
    "judge": lambda family, folder, plan: train_scene_judge(folder),
    "check": lambda family, folder, plan: check(family, folder),
    "export": lambda family, folder, plan: export(family, folder),
}
"""The parts of a sibling's training, in order."""
UNASKED: dict[str, Callable[[Family, Path, Fit], None]] = {"probe": probe}
"""Parts that are made only if they are named."""
