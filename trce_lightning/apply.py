"""``python -m trce_lightning.apply EDIT MODEL``: apply stage 1 of a run to a model's files.

Only the tensors that the edit changes are read, one at a time, and no network is opened. So an edit that was
solved on a large machine is applied on a small one. MODEL must be the model that the run edited, unedited:
edits do not compose.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from trce_lightning.cli import expected_failures, hidden
from trce_lightning.errors import InputError
from trce_lightning.runtime.signals import stop
from trce_lightning.runtime.streams import keep_speaking

log = logging.getLogger(__name__)


def apply(edit: Path, model: str, out: Path | None, delta: Path | None) -> None:
    """Write an edited copy of a model's folder, a file of the edited tensors, or both.

    Args:
        edit: ``edit.safetensors`` of a run.
        model: the folder or hub id of the model that the run edited.
        out: the folder of the copy, or None.
        delta: the file of the edited tensors in their stored type, or None.

    Raises:
        FileNotFoundError: there is no such edit or model.
        InputError: the edit doesn't fit the model, or nothing is to be written, or a place is taken.
    """
    # Imported here, because diffusers is slow to import and --help needs none of it.
    from trce_lightning.adapters import stored_pipeline
    from trce_lightning.export import (
        TEXTUAL_METHOD,
        card_facts,
        load_solved,
        save_stored_delta,
        save_stored_pipeline,
    )

    if out is None and delta is None:
        raise InputError("apply: expected --out FOLDER, --delta FILE or both, got none")
    for option, path in (("--out", out), ("--delta", delta)):
        if path is not None and path.exists():
            raise InputError(f"{option}: expected a new place, got '{path}', which is there")
    if not edit.is_file():
        raise FileNotFoundError(f"EDIT: no file '{edit}'; expected edit.safetensors of a run")
    solved = load_solved(edit)
    pipeline = stored_pipeline(model)
    facts = {"base_model": model, "fingerprint": solved.fingerprint}
    if delta is not None:
        save_stored_delta(delta, pipeline.denoiser, solved.edits, facts)
        log.info("%s: the edited tensors", delta)
    if out is not None:
        count = sum(len(own.columns) for own in solved.edits)
        card = card_facts(model, solved.concepts, TEXTUAL_METHOD, "", count)
        save_stored_pipeline(out, pipeline, solved.edits, card)
        log.info("%s: the edited copy", out)


def main(argv: Sequence[str] | None = None) -> None:
    """Apply an edit. An expected failure exits with code 2."""
    keep_speaking()
    with stop.installed("nothing is written"), expected_failures(), hidden("bitsandbytes"):
        options = _parser().parse_args(argv)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        apply(options.edit, options.model, options.out, options.delta)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("edit", type=Path, metavar="EDIT", help="edit.safetensors of a run")
    add("model", metavar="MODEL", help="folder or hub id of the model that the run edited")
    add("--out", type=Path, metavar="FOLDER", help="for an edited copy of the whole pipeline")
    add("--delta", type=Path, metavar="FILE", help="for the edited tensors alone, in their stored type")
    return parser


if __name__ == "__main__":
    main()
