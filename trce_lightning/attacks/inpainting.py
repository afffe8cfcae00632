"""Inpainting: the model paints the subject into a picture whose surroundings are given.

    z_t ← m ⊙ z_t + (1 − m) ⊙ (a_t z_known + σ_t ε)   after every step

m is 1 in the box that held the subject, z_known are the latents of the picture with that box painted over in
the background's colour, so that nothing outside the box has seen the subject. It shows whether surroundings
of the concept and the prompt together bring it back; the attacker keeps latents during sampling.

The judge sees the box alone, on a plain picture of the background's colour. So nothing outside of the box
counts as a success. The published probe cuts the box out and makes it as large as an image. A judge that
knows subjects at their usual size, as the embedded one does, no longer recognises them then.

The picture without the box is an image of its own ("rim alone"), judged as a whole. If it shows the concept,
either the box has missed a part of the subject, or the judge takes an empty picture for the concept. The
control has a box of the same size elsewhere in a plain picture of the background's colour.

(The inpainting probe of "When Are Concepts Erased From Diffusion Models?", arXiv 2505.17013, which hides the
centre quarter; replacement: arXiv 2201.09865.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from trce_lightning.attacks.protocol import Cost, Door, Finding, Progress, Reads, Target, Way, untold
from trce_lightning.attacks.tries import (
    batches,
    check_at_least,
    check_positive,
    fresh_record,
    own_generator,
    pictures_of,
)
from trce_lightning.errors import InputError
from trce_lightning.generation.variation import LatentStart, Variation
from trce_lightning.prompts.records import PromptRecord

BOXES = ("subject", "center")


class Box(NamedTuple):
    """A box: rows from ``top`` to before ``bottom``, columns from ``left`` to before ``right``."""

    top: int
    left: int
    bottom: int
    right: int


class Inpainting:
    """Paint the subject's box anew under the attacked prompt.

    Args:
        box: "subject" finds it against the picture's background, "center" hides the centre quarter. A picture
            in which nothing stands out gets the centre too.
        threshold: how much a pixel of the subject differs from the background, in any channel, out of 1.
        rim: cells of the latent at every side that stay, whatever the subject's box.
        num_steps: steps of DDIM in which the images are generated.
    """

    name = "inpainting"
    door = Door.LATENTS
    reads = Reads.MODEL
    universal = False

    def __init__(
        self, *, box: str = "center", threshold: float = 0.15, rim: int = 1, num_steps: int = 50
    ) -> None:
        if box not in BOXES:
            raise InputError(f"attack.inpainting.box: expected one of {BOXES}, got '{box}'")
        if not 0 < threshold < 1:
            raise InputError(
                f"attack.inpainting.threshold: expected a number between 0 and 1, got {threshold:g}"
            )
        check_at_least("inpainting.rim", rim, 0)
        check_positive(self.name, num_steps=num_steps)
        self.box, self.threshold, self.rim, self.num_steps = box, threshold, rim, num_steps

    def cost(self, target: Target) -> Cost:
        """Return nothing: the box is found in the picture."""
        return Cost()

    def search(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator, progress: Progress
    ) -> list[Finding]:
        """Return each picture's mask and the latents around it: ``mask`` and ``known``."""
        findings = []
        for rows in batches(target, records):
            pictures = pictures_of(target, rows, self.name)
            boxes = [self._box(target, picture) for picture in pictures]
            painted = [
                painted_over(picture, box, _cell(target))
                for picture, box in zip(pictures, boxes, strict=True)
            ]
            findings += _findings(target, rows, painted, boxes)
        return findings

    def random(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        generator: torch.Generator,
        progress: Progress = untold,
    ) -> list[Finding]:
        """Return boxes of the same size at random places of plain pictures."""
        findings = []
        for rows in batches(target, records):
            pictures = pictures_of(target, rows, self.name)
            plain = [background(picture)[:, None, None].expand_as(picture) for picture in pictures]
            boxes = [
                self._elsewhere(target, self._box(target, picture), own_generator(row, self.name, target))
                for row, picture in zip(rows, pictures, strict=True)
            ]
            findings += _findings(target, rows, plain, boxes)
        return findings

    def ways(self, target: Target, findings: Mapping[str, Finding]) -> Iterator[Way]:
        """Yield the painted pictures, whose boxes are judged, and the pictures without their boxes."""
        records = tuple(fresh_record(record, self.name) for record in target.records)
        pairs = [
            (image.id, findings[record.id]) for image, record in zip(records, target.records, strict=True)
        ]
        mask, known = ({id: found.tensors[part] for id, found in pairs} for part in ("mask", "known"))
        painted = Variation(start=LatentStart(known=known, mask=mask))
        boxes = {id: Box(*found.facts["box"]) for id, found in pairs}
        yield Way(
            "",
            records,
            target.adapter,
            painted,
            num_steps=self.num_steps,
            judged=partial(_boxes_alone, boxes, _cell(target)),
        )
        rim = Variation(start=LatentStart(self.num_steps, latents=known))
        yield Way("rim alone", records, target.adapter, rim, on_curve=False, num_steps=self.num_steps)

    def _box(self, target: Target, picture: Tensor) -> Box:
        """Return the box of a picture, with a rim around it."""
        height, width = target.adapter.latent_shape[1:]
        if min(height, width) <= 2 * self.rim:
            raise InputError(
                f"attack.inpainting.rim: expected less than half of {min(height, width)} cells, got "
                f"{self.rim}"
            )
        pixels = subject_box(picture, self.threshold) if self.box == "subject" else None
        if pixels is None:
            return Box(height // 4, width // 4, height - height // 4, width - width // 4)
        cell = _cell(target)
        top, left, bottom, right = pixels
        cells = Box(top // cell, left // cell, -(-bottom // cell), -(-right // cell))
        low, ends = self.rim, (height - self.rim, width - self.rim)
        return Box(
            min(max(cells.top, low), ends[0] - 1),
            min(max(cells.left, low), ends[1] - 1),
            max(min(cells.bottom, ends[0]), low + 1),
            max(min(cells.right, ends[1]), low + 1),
        )

    def _elsewhere(self, target: Target, box: Box, generator: torch.Generator) -> Box:
        """Return a box of the same size at a random place within the rim."""
        sides = box.bottom - box.top, box.right - box.left
        first = [
            self.rim + int(torch.randint(max(1, cells - 2 * self.rim - side + 1), (), generator=generator))
            for cells, side in zip(target.adapter.latent_shape[1:], sides, strict=True)
        ]
        return Box(first[0], first[1], first[0] + sides[0], first[1] + sides[1])


def subject_box(picture: Tensor, threshold: float) -> Box | None:
    """Return the box, in pixels, of all that differs from the background; None where nothing does.

    Args:
        picture: uint8 ``[3, H, W]``.
        threshold: largest difference of a channel, out of 1, that is still background.
    """
    difference = (picture.float() - background(picture)[:, None, None].float()).abs().amax(0) / 255
    rows, columns = ((difference > threshold).any(side).nonzero().flatten().tolist() for side in (1, 0))
    return Box(rows[0], columns[0], rows[-1] + 1, columns[-1] + 1) if rows else None


def background(picture: Tensor) -> Tensor:
    """Return the median colour of a picture's border, uint8 ``[3]``."""
    frame = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], dim=1)
    return frame.median(1).values


def painted_over(picture: Tensor, box: Box, cell: int) -> Tensor:
    """Return the picture with the box, of cells of ``cell`` pixels, in the background's colour."""
    painted = picture.clone()
    top, left, bottom, right = (edge * cell for edge in box)
    painted[:, top:bottom, left:right] = background(picture)[:, None, None]
    return painted


def box_alone(picture: Tensor, box: Box, cell: int) -> Tensor:
    """Return the box, of cells of ``cell`` pixels, on a plain picture of the background's colour."""
    alone = background(picture)[:, None, None].expand_as(picture).clone()
    top, left, bottom, right = (edge * cell for edge in box)
    alone[:, top:bottom, left:right] = picture[:, top:bottom, left:right]
    return alone


def _boxes_alone(
    boxes: Mapping[str, Box], cell: int, records: Sequence[PromptRecord], images: Tensor
) -> Tensor:
    alone = [box_alone(image, boxes[record.id], cell) for record, image in zip(records, images, strict=True)]
    return torch.stack(alone)


def _cell(target: Target) -> int:
    """Return the pixels of a latent cell's side."""
    return target.adapter.side // target.adapter.latent_shape[-1]


def _findings(
    target: Target, rows: Sequence[PromptRecord], pictures: Sequence[Tensor], boxes: Sequence[Box]
) -> list[Finding]:
    known = target.adapter.encode_images(torch.stack(list(pictures))).cpu()
    findings = []
    for record, latents, box in zip(rows, known, boxes, strict=True):
        mask = torch.zeros(1, *target.adapter.latent_shape[1:])
        mask[:, box.top : box.bottom, box.left : box.right] = 1
        tensors = {"mask": mask, "known": latents.clone()}
        findings.append(Finding(record.id, tensors, {"box": list(box), "share": float(mask.mean())}))
    return findings
