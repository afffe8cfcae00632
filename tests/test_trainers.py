"""The precision that ``trainer.precision=auto`` finds, on older and newer hardware."""

import pytest
import torch

from trce_lightning.jobs.trainers import choose_precision


@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
@pytest.mark.parametrize(
    ("has_avx512_bf16", "has_amx", "expected"),
    [(False, False, "32-true"), (True, False, "bf16-mixed"), (False, True, "bf16-mixed")],
)
def test_auto_takes_bfloat16_where_a_cpu_has_its_instructions(
    has_avx512_bf16: bool, has_amx: bool, expected: str, accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert choose_precision("auto", accelerator) == expected


@pytest.mark.parametrize(("is_native", "expected"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_auto_takes_float16_on_a_gpu_that_only_emulates_bfloat16(
    is_native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: is_native or including_emulation
    )
    assert choose_precision("auto", "gpu") == expected
    assert choose_precision("auto", "cpu") == "32-true"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_what_is_asked_for_is_what_a_run_takes(precision: str) -> None:
    assert choose_precision(precision, "cpu") == precision
