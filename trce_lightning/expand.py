"""``python -m trce_lightning.expand CONCEPT --model NAME``: a concept file written by a language model.

As in TRCE (arXiv 2503.07389), the file has 20 terms, each with a safe counterpart, and 15 templates. The
model answers behind an OpenAI-compatible endpoint (OPENAI_BASE_URL, OPENAI_API_KEY). ``transformers serve``
starts such an endpoint on your own machine. Only the form of the file is checked, so read it before use.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trce_lightning.cli import expected_failures
from trce_lightning.concepts import Concept, load_concept
from trce_lightning.concepts.chat import EndpointChat
from trce_lightning.concepts.defaults import KINDS
from trce_lightning.concepts.draft import ALSO, Draft, Entry, Reply, Wanted
from trce_lightning.errors import InputError
from trce_lightning.runtime.signals import stop
from trce_lightning.runtime.streams import keep_speaking

__all__ = ["expand", "write_concept"]

SYSTEM = (
    "You help to make text-to-image models safe. You list phrases that name an unwanted concept, so that a "
    "model can be taught not to draw it. You answer with one JSON object and nothing else."
)
_ASKS = {
    "subject": "List {count} different short noun phrases that name or show it, as prompts for images have "
    "them: synonyms, things, deeds and scenes, with their article where English wants one. Give each a safe "
    "counterpart: a harmless noun phrase that fits the same sentence and names neither the concept nor any "
    "of the phrases.",
    "style": "List {count} different short phrases that name or describe this way of drawing, and that can "
    'stand before the word "style": names, techniques, tools, schools. Give each a safe counterpart: another '
    "way of drawing that fits the same sentence, keeps medium and subject, and names neither the concept nor "
    "any of the phrases.",
}
_EXAMPLES = {
    "subject": Reply(
        terms=[Entry(term="a dagger", counterpart="a rose", wordings=["a blade", "a sharp dagger"])],
        neighbours=["a fork"],
        related=["stabbing"],
    ),
    "style": Reply(
        terms=[Entry(term="clay 3d", counterpart="flat paper", wordings=["claymation"])],
        neighbours=["a pencil sketch"],
        related=["rendering"],
    ),
}
"""An example reply for each kind of concept, as in :data:`_ASKS`."""
log = logging.getLogger(__name__)


def expand(chat: EndpointChat, wanted: Wanted, attempts: int = 3) -> Concept:
    """Ask the model for terms until there are as many as wanted, and return the concept.

    Args:
        chat: the model to ask.
        wanted: the wanted properties of the concept.
        attempts: the number of replies in a row without a new term after which to stop.

    Raises:
        InputError: ``attempts`` replies brought no new term.
        OSError: no reply came.
    """
    if attempts < 1:
        raise InputError(f"--attempts: expected at least 1, got {attempts}")
    draft, refused, left = Draft(wanted, chat.source), list[str](), attempts
    with logging_redirect_tqdm(), tqdm(total=wanted.terms, desc="terms", unit="term") as bar:
        while (missing := wanted.terms - len(draft.terms)) and left:
            log.info("asking %s for %d terms", chat.source, missing)
            refused = draft.take(chat.ask(SYSTEM, request(wanted, draft.terms, refused)))
            new = missing - wanted.terms + len(draft.terms)
            bar.update(new)
            left = attempts if new else left - 1
            if refused:
                log.warning("%d new terms; refused: %s", new, "; ".join(refused[:3]))
    if missing:
        raise InputError(
            f"--terms: expected {wanted.terms}, got {len(draft.terms)} from {chat.source}, whose last "
            f"{attempts} replies (--attempts) brought none; the last one: {'; '.join(refused[:3])}"
        )
    return draft.finished()


def request(wanted: Wanted, terms: Sequence[str], refused: Sequence[str]) -> str:
    """Return the next request. It names the terms so far, and why others were refused."""
    unasked = set(ALSO) - wanted.also
    example = _EXAMPLES[wanted.kind].model_dump_json(
        exclude={"terms": {"__all__": unasked}, **dict.fromkeys(unasked, True)}
    )
    lines = [
        f"Concept: {wanted.concept}",
        _ASKS[wanted.kind].format(count=wanted.terms - len(terms)),
        *(ALSO[name] for name in ALSO if name in wanted.also),
        "Reply with one JSON object of this form:",
        example,
        *([f"These are there, give others: {'; '.join(terms)}"] if terms else []),
        *([f"In your last reply this was wrong: {'; '.join(refused[:5])}"] if refused else []),
    ]
    return "\n".join(lines)


def write_concept(path: Path, concept: Concept, force: bool = False) -> None:
    """Write a concept file that :func:`load_concept` reads.

    Raises:
        InputError: the file exists, and ``force`` is False.
    """
    from trce_lightning.runtime.storage import replacing

    _check_free(path, force)
    text = OmegaConf.to_yaml(
        OmegaConf.create({key: value for key, value in asdict(concept).items() if value})
    )
    with replacing(path) as aside:
        aside.write_text(f"# @package concept.{concept.name}\n{text}", encoding="utf-8")
        assert load_concept(aside) == concept, "a concept file reads as what was written"
        if not force:
            _claim(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Write a concept file. An expected failure exits with code 2 and writes no file."""
    keep_speaking()
    with stop.installed("nothing is written"), expected_failures():
        options = _parser().parse_args(argv)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for name in ("httpx", "httpx2"):  # they would log every request
            logging.getLogger(name).setLevel(logging.WARNING)
        wanted = Wanted(
            options.concept,
            options.name,
            options.terms,
            options.templates,
            frozenset(options.also),
            options.kind,
        )
        path = options.out or Path(f"{wanted.itself.name}.yaml")
        _check_free(path, options.force)
        chat = EndpointChat(options.model, options.timeout, options.retries)
        write_concept(path, expand(chat, wanted, options.attempts), options.force)
        log.info("%s: read it, then erase with concept=%s", path, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("concept", metavar="CONCEPT", help="the concept in free words")
    add("--out", type=Path, metavar="FILE", help="default: NAME.yaml")
    add("--force", action="store_true", help="overwrite FILE")
    add("--name", default="", help="name of the concept; default: made of its words")
    add("--kind", choices=KINDS, default=Wanted.kind, help="style: a way of drawing; default: %(default)s")
    add("--terms", type=int, default=Wanted.terms, metavar="N", help="default: %(default)s")
    add("--templates", type=int, default=Wanted.templates, metavar="N", help="default: %(default)s")
    add("--also", nargs="+", choices=list(ALSO), default=[], help="further lists to ask for")
    add("--attempts", type=int, default=3, metavar="N", help="useless replies in a row; default: %(default)s")
    add("--model", metavar="NAME", required=True, help="name of the model behind OPENAI_BASE_URL")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="for a reply; default: %(default)g")
    add("--retries", type=int, default=4, metavar="N", help="tries after no reply; default: %(default)s")
    return parser


def _check_free(path: Path, force: bool) -> None:
    if path.is_dir() or (path.exists() and not force):
        raise InputError(f"--out: expected a new file, or --force, got '{path}', which is there")


def _claim(path: Path) -> None:
    """Create the file. Refuse it if another process has created it since :func:`_check_free`."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        _check_free(path, force=False)


if __name__ == "__main__":
    main()
