"""Images against StableDiffusionPipeline; counts, resume and refusals of image folders."""

import json
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.errors import InputError
from trce_lightning.generation.image_folder import image_batches
from trce_lightning.generation.loop import generate, generate_to, load_images, planned_evaluations, shard
from trce_lightning.prompts.records import PromptRecord, seed_of
from trce_lightning.sampling import noise

NUM_STEPS = 3
RECORDS = (
    PromptRecord("a/0", "a dagger", seed=5),
    PromptRecord("a/1", "a rose"),
    PromptRecord("a/2", "a gun", guidance_scale=1.0),
    PromptRecord("a/3", "a camera on a table", guidance_scale=12.0),
    PromptRecord("a/4", ""),
)
SETTINGS = {"guidance_scale": 4.0, "num_steps": NUM_STEPS}


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_equals_the_pipeline(prediction_type) -> None:
    pipeline = build_tiny_pipeline(prediction_type)
    adapter = StableDiffusionAdapter(pipeline)
    ours = generate(adapter, RECORDS, batch_size=8, **SETTINGS)
    assert ours.shape == (5, 3, 16, 16)
    assert ours.dtype == torch.uint8
    assert ours.float().std() > 20  # a flat image would equal anything

    for record, image in zip(RECORDS, ours, strict=True):
        seed = seed_of(record.id, 0) if record.seed is None else record.seed
        theirs = pipeline(
            record.prompt,
            latents=noise(adapter.latent_shape, seed)[None],
            guidance_scale=record.guidance_scale or 4.0,
            num_inference_steps=NUM_STEPS,
            output_type="pt",
        ).images[0]
        assert largest_difference(image, (theirs * 255).round()) <= 1
    # The comparison can tell: another scale, seed or number of steps is far away.
    for change in ({"guidance_scale": 5.0}, {"num_steps": NUM_STEPS + 1}):
        other = generate(adapter, RECORDS[:1], batch_size=1, **{**SETTINGS, **change})
        assert largest_difference(other[0], ours[0]) > 1


SCALES = (0.0, 0.5, 1.0, 1.5, 7.5)


@pytest.mark.parametrize("own", [False, True], ids=["one scale for all", "each image its own"])
def test_every_guidance_scale_draws_what_the_pipeline_does(tiny_adapter, own) -> None:
    """Both ways that a scale is taken; ``own`` mixes guided and other images in one batch."""
    pipeline = tiny_adapter.pipeline
    theirs = {}
    for scale in SCALES:
        images = pipeline(
            "a dagger",
            latents=noise(tiny_adapter.latent_shape, 5)[None],
            guidance_scale=scale,
            num_inference_steps=NUM_STEPS,
            output_type="pt",
        ).images
        theirs[scale] = (images[0] * 255).round()
    assert largest_difference(theirs[1.0], theirs[1.5]) > 1 and torch.equal(theirs[0.0], theirs[1.0])
    before = tiny_adapter.network_evaluations
    if own:
        records = [PromptRecord(f"{w}", "a dagger", seed=5, guidance_scale=w) for w in SCALES]
        images = generate(tiny_adapter, records, guidance_scale=4.0, num_steps=NUM_STEPS, batch_size=5)
    else:
        record = PromptRecord("x", "a dagger", seed=5)
        drawn = [
            generate(tiny_adapter, [record], guidance_scale=w, num_steps=NUM_STEPS, batch_size=1)
            for w in SCALES
        ]
        images = torch.cat(drawn)
    for scale, image in zip(SCALES, images, strict=True):
        assert largest_difference(image, theirs[scale]) <= 1, scale
    assert tiny_adapter.network_evaluations - before == NUM_STEPS * (1 + 1 + 1 + 2 + 2)


def test_images_that_an_earlier_version_drew_below_1_are_not_mixed_with_ours(tiny_adapter, tmp_path) -> None:
    below = {**SETTINGS, "guidance_scale": 0.5, "batch_size": 5}
    for folder, settings in (
        (tmp_path / "above", {**SETTINGS, "batch_size": 5}),
        (tmp_path / "below", below),
    ):
        generate_to(folder, tiny_adapter, RECORDS, **settings)
        meta = json.loads((folder / "meta.json").read_text())
        assert ("guidance below 1" in meta) == (folder.name == "below")
    del meta["guidance below 1"]
    (tmp_path / "below" / "meta.json").write_text(json.dumps(meta, indent=0) + "\n")
    with pytest.raises(InputError, match="delete the folder or choose another"):
        generate_to(tmp_path / "below", tiny_adapter, RECORDS, **below)


def test_independent_of_batch_size_and_autocast_only_rounds(tiny_adapter) -> None:
    whole = generate(tiny_adapter, RECORDS, batch_size=5, **SETTINGS)
    assert largest_difference(generate(tiny_adapter, RECORDS, batch_size=2, **SETTINGS), whole) <= 1
    rounded = generate(tiny_adapter, RECORDS, batch_size=5, autocast_dtype=torch.bfloat16, **SETTINGS)
    assert 0 < largest_difference(rounded, whole) < 30
    assert len(generate(tiny_adapter, (), batch_size=5, **SETTINGS)) == 0


def test_planned_evaluations_are_what_the_network_counts(tiny_adapter, capsys) -> None:
    for guidance_scale, expected in ((4.0, 9), (1.0, 6), (0.0, 6)):
        before = tiny_adapter.network_evaluations
        generate(tiny_adapter, RECORDS, guidance_scale=guidance_scale, num_steps=2, batch_size=3)
        assert tiny_adapter.network_evaluations - before == 2 * expected
        assert planned_evaluations(RECORDS, 2, guidance_scale) == 2 * expected
    assert "eval" not in capsys.readouterr().err
    generate(tiny_adapter, RECORDS, batch_size=3, description="drawing", **SETTINGS)
    assert "drawing: 100%" in (shown := capsys.readouterr().err)
    assert "27/27" in shown


def test_shards_are_disjoint_and_complete() -> None:
    for world_size in (1, 2, 3, 7):
        shards = [shard(RECORDS, rank, world_size) for rank in range(world_size)]
        assert sorted(record.id for part in shards for record in part) == [r.id for r in RECORDS]
    with pytest.raises(ValueError, match="rank"):
        shard(RECORDS, 2, 2)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_resume_gives_identical_files(tiny_adapter, tmp_path) -> None:
    assert generate_to(tmp_path, tiny_adapter, RECORDS, batch_size=2, **SETTINGS) == 5
    whole = contents(tmp_path)
    assert len(whole) == 7  # no partial file is left
    before = tiny_adapter.network_evaluations
    assert generate_to(tmp_path, tiny_adapter, RECORDS, batch_size=2, **SETTINGS) == 0
    assert tiny_adapter.network_evaluations == before

    for name in ("00001.png", "00002.png"):
        (tmp_path / name).unlink()
    kept = (tmp_path / "00003.png").stat().st_mtime_ns
    assert generate_to(tmp_path, tiny_adapter, RECORDS, batch_size=2, **SETTINGS) == 2
    assert contents(tmp_path) == whole
    assert (tmp_path / "00003.png").stat().st_mtime_ns == kept

    manifest = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert manifest[2] == {
        "id": "a/2",
        "prompt": "a gun",
        "seed": seed_of("a/2", 0),
        "guidance_scale": 1.0,
        "file": "00002.png",
    }


def test_ranks_fill_one_folder_and_the_manifest_pairs(tiny_adapter, tmp_path) -> None:
    for rank in (1, 0):
        generate_to(tmp_path, tiny_adapter, RECORDS, batch_size=2, rank=rank, world_size=2, **SETTINGS)
    whole = generate(tiny_adapter, RECORDS, batch_size=2, **SETTINGS)
    assert largest_difference(load_images(tmp_path, RECORDS), whole) <= 1
    backwards = load_images(tmp_path, RECORDS[:0:-1])
    assert largest_difference(backwards, whole.flip(0)[:-1]) <= 1
    assert largest_difference(whole[0], whole[1]) > 1
    assert len(load_images(tmp_path, ())) == 0


def test_images_are_read_a_few_at_a_time(tiny_adapter, tmp_path, capsys) -> None:
    generate_to(tmp_path, tiny_adapter, RECORDS, batch_size=2, **SETTINGS)
    parts = list(image_batches(tmp_path, RECORDS, "looking", size=2))
    assert [len(images) for _, images in parts] == [2, 2, 1]
    assert [record for rows, _ in parts for record in rows] == list(RECORDS)
    assert torch.equal(torch.cat([images for _, images in parts]), load_images(tmp_path, RECORDS))
    assert "looking: 100%" in capsys.readouterr().err


def test_other_folders_are_refused(tiny_adapter, tmp_path) -> None:
    def fill(records=RECORDS[:1], adapter=tiny_adapter, **changes):
        return generate_to(tmp_path, adapter, records, **{**SETTINGS, "batch_size": 2, **changes})

    fill()
    before = contents(tmp_path)
    other = StableDiffusionAdapter(build_tiny_pipeline())
    other.denoiser.conv_out.bias.data += 1
    for expected, call in (
        (r"meta.json: expected \"num_steps\": 4", lambda: fill(num_steps=4)),
        ('meta.json: expected "generator"', lambda: fill(adapter=other)),
        ('meta.json: expected "precision": "bfloat16"', lambda: fill(autocast_dtype=torch.bfloat16)),
        ("manifest.jsonl: expected .*a rose", lambda: fill(RECORDS[:2])),
        ("manifest.jsonl: expected .*5.0", lambda: fill(guidance_scale=5.0)),
        ("different id", lambda: fill(RECORDS[:1] * 2)),
        ("batch_size", lambda: fill(batch_size=0)),
    ):
        with pytest.raises(ValueError, match=expected):
            call()
        assert contents(tmp_path) == before
    (tmp_path / "manifest.jsonl").unlink()
    with pytest.raises(ValueError, match="expected an empty folder"):
        fill()


def test_load_images_refuses_what_is_missing_unreadable_or_anothers(tiny_adapter, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="manifest"):
        load_images(tmp_path, RECORDS)
    generate_to(tmp_path, tiny_adapter, RECORDS[:2], batch_size=2, **SETTINGS)
    for wrong in (
        PromptRecord("a/0", "a spoon", seed=5),
        PromptRecord("a/0", "a dagger", seed=6),
        PromptRecord("a/0", "a dagger", seed=5, guidance_scale=3.0),
        PromptRecord("b/0", "a dagger", seed=5),
    ):
        with pytest.raises(ValueError, match=r"manifest.jsonl: expected .*'[ab]/0'"):
            load_images(tmp_path, [wrong])
    image = tmp_path / "00001.png"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"00001.png: expected a readable image"):
        load_images(tmp_path, RECORDS[:2])
    image.unlink()
    with pytest.raises(FileNotFoundError, match=r"00001.png"):
        load_images(tmp_path, RECORDS[:2])
