"""``docs/models.md`` says what opens and what is refused: each row is what is found."""

from pathlib import Path

import pytest
from model_table import CASES, LEVELS, PAGE, Case, scheduled
from numpy import abs as absolute

from trce_lightning.adapters import StableDiffusionAdapter

ROWS = PAGE.read_text(encoding="utf-8").splitlines()
NAMED = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_row_is_what_is_found(case: Case) -> None:
    row = case.row()
    assert row.startswith(f"| {case.name} | {f'yes | at most {LEVELS} of' if case.opens else 'no | '}"), row
    assert row in ROWS, f"PYTHONPATH=. python tests/model_table.py writes the table anew: {row}"


@pytest.mark.parametrize(
    "name",
    [
        "`timestep_spacing=trailing`",
        "`set_alpha_to_one=False`",
        "`trained_betas`",
        "`prediction_type=v_prediction`",
        "textual inversion of three vectors",
        "text encoder with `use_attention_mask`",
        "`AutoencoderTiny`",
        "`enable_freeu`",
    ],
)
def test_the_comparison_sees_what_a_row_is_about(name: str, tmp_path: Path) -> None:
    """Without it diffusers draws another picture."""
    case = NAMED[name]
    here = case.drawn_here(case.open(tmp_path), None, 3)
    assert absolute(here - case.drawn_by_diffusers(scheduled()(), None, 3)).max() > LEVELS


def test_a_scheduler_in_memory_is_that_of_its_folder() -> None:
    """diffusers' from_config would put DDIM's defaults in place of the scheduler's own."""
    for name in ("LCMScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler"):
        pipeline = scheduled(name)()
        adapter = StableDiffusionAdapter(pipeline)
        settings = pipeline.scheduler.config
        assert {key: settings[key] for key in ("beta_end", "timestep_spacing", "steps_offset")} == {
            key: adapter.ddim.config[key] for key in ("beta_end", "timestep_spacing", "steps_offset")
        }
