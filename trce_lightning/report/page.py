"""Write ``report.html``: verdict, table, curves, and every prompt's images, on one page without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from trce_lightning.errors import InputError
from trce_lightning.evaluation.comparison import Comparison
from trce_lightning.evaluation.scored import Column, Scored
from trce_lightning.generation.image_folder import image_files
from trce_lightning.metrics.asr import THRESHOLD
from trce_lightning.metrics.collateral import Detection
from trce_lightning.prompts.records import BENIGN, PromptSet
from trce_lightning.report.attacks import (
    Attacks,
    about,
    attacks_table,
    budget_figure,
    certainty_table,
    pooled_sentence,
    transfer_table,
    weakest_door,
)
from trce_lightning.report.curves import threshold_figure, trade_off_figure, trade_off_points
from trce_lightning.report.tables import Scores, rate_cell, results_rows
from trce_lightning.runtime.storage import MADE_AGAIN, write_text

THUMBNAIL = 128  # pixels, the longer side at most


@dataclass(frozen=True)
class Report:
    """The content of a page.

    Args:
        title: the heading, such as "violence erased from emoji".
        columns: models by label. If the original is one of them, it comes first.
        sets: the prompts, for which all models have images.
        comparisons: the comparison of each further model with the first, by label.
        categories: attack success by model, set and category.
        pictures: titles and image files of more figures, such as the curves of a training run.
        facts: facts that reproduce the result, by name: command, commit, settings.
        robustness: the cells of the table of conditions of use, headings first. Empty without conditions.
        attacks: attacks on each attacked model, which the page begins with.
    """

    title: str
    columns: Mapping[str, Column]
    sets: Sequence[PromptSet]
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    categories: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    robustness: Sequence[Sequence[str]] = ()
    attacks: Sequence[Attacks] = ()

    @property
    def scored(self) -> dict[str, Scored]:
        """Return scores with their detections, by label."""
        return {label: column.scored for label, column in self.columns.items()}

    @property
    def scores(self) -> dict[str, Scores]:
        """Return scores alone, by label."""
        return {label: column.scored.scores for label, column in self.columns.items()}


def write_page(file: Path, report: Report) -> None:
    """Write the page. ``FileNotFoundError`` or ``InputError`` if an image is missing or unreadable."""
    header, *rows = results_rows(report.scores)
    figures = {"ASR by threshold": svg(threshold_figure(report.scored))}
    if len(points := trade_off_points(report.scores)) > 1:
        figures["ASR against FID"] = svg(trade_off_figure(points))
    pictures = {title: _data_uri(Image.open(path)) for title, path in report.pictures.items()}
    page = rendered(
        "report.html.j2",
        report=report,
        verdict=verdict(report),
        attacked=[
            attacks_section(content) | {"id": f"attacks-{i}"} for i, content in enumerate(report.attacks)
        ],
        header=header,
        rows=rows,
        category_rows=category_rows(report.categories),
        figures=figures,
        pictures=pictures,
        prompts=[row for prompts in report.sets for row in prompt_rows(prompts, report.columns)],
        set_names=[prompts.name for prompts in report.sets],
        zip=zip,
    )
    write_text(file, page)


def rendered(template: str, **content: Any) -> str:
    """Return a page from a template of this package."""
    environment = Environment(
        loader=PackageLoader("trce_lightning.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)


def attacks_section(content: Attacks) -> dict[str, Any]:
    """Return what the section's template shows: sentences, tables, and a part for each attack."""
    return {
        "content": content,
        "sentences": weakest_door(content),
        "table": attacks_table(content),
        "certainty": certainty_table(content),
        "pooled": list(map(pooled_sentence, content.pooled)),
        "transfer": transfer_table(content),
        "parts": [_attack_part(content, attack) for attack in content.own],
    }


def _attack_part(content: Attacks, attack: str) -> dict[str, Any]:
    """Return what the page says of one attack, with its curve and its images."""
    figure = budget_figure(content, attack)
    labels = (content.original, f"{content.label}, attacked")
    return {
        "title": f"{content.doors[attack]}: {attack}",
        "sentences": about(content, attack),
        "figure": None if figure is None else svg(figure),
        "finds": [
            (find, list(zip(labels, map(_thumbnail, (find.original, find.image)), strict=True)))
            for find in content.finds
            if find.attack == attack
        ],
    }


def verdict(report: Report) -> str:
    """Return the last model's result in one to three sentences.

    If there are several models, add the first's.
    """
    label, last = next(iter(report.columns)), list(report.columns)[-1]
    first, scores, compared = report.scores[label], report.scores[last], label != last
    rates = [
        f"{100 * rate['rate']:.1f} % of {name} prompts (95 % interval {100 * rate['low']:.1f} to "
        f"{100 * rate['high']:.1f} %)"
        + (f", {100 * first['asr'][name]['rate']:.1f} % before" if compared else "")
        for name, rate in scores["asr"].items()
    ]
    sentences = [f"“{last}” shows the concept in {'; in '.join(rates)}."] if rates else []
    if "benign_accuracy" in scores:
        was = f", {100 * first['benign_accuracy']:.1f} % before" if compared else ""
        sentences.append(f"It draws {100 * scores['benign_accuracy']:.1f} % of benign prompts right{was}.")
    if compared and first.get("fid") and "fid" in scores:
        sentences.append(f"FID is {scores['fid'] / first['fid']:.2f} times what it was.")
    return " ".join(sentences)


def category_rows(categories: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, list[str]]:
    """Return cells for each "set, category": attack success with its interval, one cell per model."""
    titles: dict[str, list[str]] = {}
    for by_set in categories.values():
        for name, rates in by_set.items():
            for category, rate in rates.items():
                titles.setdefault(f"{name}, {category}", []).append(rate_cell(rate))
    return titles


def prompt_rows(prompts: PromptSet, columns: Mapping[str, Column]) -> list[dict[str, Any]]:
    """Return one row of the table for each prompt: set, id, text, and a cell for each model.

    A cell has the image as a data URI, the probability that it shows the concept, and the subject that the
    judge sees. ``hit`` is True if the image shows the concept. ``covered`` is True for hits and for all
    images of the other sets than benign.
    """
    files = {
        label: image_files(column.images / prompts.name, prompts.records) for label, column in columns.items()
    }
    return [
        {
            "set": prompts.name,
            "id": record.id,
            "prompt": record.prompt,
            "cells": [
                _cell(files[label][index], column.scored.detections[prompts.name][record.id], prompts.name)
                for label, column in columns.items()
            ],
        }
        for index, record in enumerate(prompts.records)
    ]


def _cell(file: Path, seen: Detection, set_name: str) -> dict[str, Any]:
    hit = seen.probability >= THRESHOLD
    return {
        "source": _thumbnail(file),
        "probability": seen.probability,
        "hit": hit,
        "subject": seen.subject,
        "covered": hit or set_name != BENIGN,
    }


def svg(figure: Figure) -> Markup:
    """Return a figure as SVG within a page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", facecolor="white")
    # The SVG is our own, so it is safe. HTML has no place for its XML prologue, which is cut.
    return Markup(stream.getvalue()[stream.getvalue().index("<svg") :])


def _thumbnail(file: Path) -> str:
    try:
        with Image.open(file) as image:
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            return _data_uri(image)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError) as error:
        raise InputError(f"{file}: expected a readable image, got: {error}; {MADE_AGAIN}") from error


def _data_uri(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "webp", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
