"""The prompts to keep: encoded once for an encoder, by several processes as by one."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import KEEP_PROMPTS, cpu_trainer, one_thread

from trce_lightning import kept
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.kept import encode_kept, kept_statistics


@pytest.mark.parametrize(("prompts", "devices"), [(KEEP_PROMPTS, 2), (KEEP_PROMPTS[:2], 3)])
def test_several_processes_encode_as_one(
    tiny_adapter: StableDiffusionAdapter, tmp_path: Path, prompts: Sequence[str], devices: int
) -> None:
    trainer = cpu_trainer(tmp_path, devices=devices, strategy="ddp_fork")
    with one_thread():
        encode_kept(trainer, tiny_adapter, prompts, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    alone = kept_statistics(tiny_adapter, prompts)
    for name, mean in load_file(file).items():
        torch.testing.assert_close(mean, getattr(alone, name).k, rtol=1e-5, atol=1e-7)
        # One process's share is something else.
        share = getattr(kept_statistics(tiny_adapter, prompts[::devices]), name).k
        assert not torch.allclose(mean, share, rtol=1e-2)


def test_what_is_cached_is_not_encoded_again(
    tiny_adapter: StableDiffusionAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = cpu_trainer(tmp_path)
    encode_kept(trainer, tiny_adapter, KEEP_PROMPTS, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    found = kept_statistics(tiny_adapter, KEEP_PROMPTS, tmp_path / "cache")
    assert torch.equal(found.every.k, kept_statistics(tiny_adapter, KEEP_PROMPTS).every.k)
    save_file({name: 2 * mean for name, mean in load_file(file).items()}, file)
    monkeypatch.setattr(kept, "on_each_rank", lambda *_: pytest.fail("encoded again"))
    encode_kept(trainer, tiny_adapter, KEEP_PROMPTS, tmp_path / "cache")
    twice = kept_statistics(tiny_adapter, KEEP_PROMPTS, tmp_path / "cache")
    assert torch.equal(twice.eot.k, 2 * found.eot.k)
    with pytest.raises(ValueError, match=r"textual\.keep_prompts: expected at least one"):
        encode_kept(trainer, tiny_adapter, [], tmp_path / "cache")
