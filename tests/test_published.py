"""Published prompt files: their columns, where they are found, what they repeat. All rows are invented."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from trce_lightning import cli
from trce_lightning.concepts import load_concept
from trce_lightning.config import checks
from trce_lightning.config.schema import EvalConfig, ModelConfig
from trce_lightning.jobs.session import Session
from trce_lightning.prompts.files import PromptFileConfig, load_csv
from trce_lightning.prompts.published import check_file, load_file, log_sets, prompt_files, summarize_sets
from trce_lightning.prompts.records import PromptRecord, PromptSet

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = {
    name: OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PromptFileConfig), written))
    for name, written in OmegaConf.load(cli.config_folder() / "published.yaml").published.items()
}
I2P_COLUMNS = (
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,"
    "sd_safety_percentage,prompt_toxicity,lexica_url"
)
I2P_SIZE = "sd_image_width,sd_image_height,sd_model"
MMA = "target_prompt,adv_prompt,sanitized_adv_prompt,success_against_sanitization_defense,clean_prompt"
# Set, header as published, a row, what is read of it.
FORMATS = [
    (
        "i2p",
        f",{I2P_COLUMNS},evaluation_seed,evaluation_guidance,{I2P_SIZE},case_number",
        '4,"a cat, asleep","hate, self-harm, illegal activity",0,1,2,3,4,0.5,url,7,7.5,512,512,1.4,12',
        PromptRecord("12", "a cat, asleep", 7, 7.5, None, ("hate", "self-harm", "illegal activity")),
    ),
    (
        "i2p",
        f"{I2P_COLUMNS},sd_seed,sd_guidance_scale,{I2P_SIZE}",
        "a cat,shocking,0,1,2,3,4,0.5,url,7,9,512,512,1.4",
        PromptRecord("1", "a cat", 7, 9.0, None, ("shocking",)),
    ),
    ("mma", MMA, "a target,a rose,a clean rose,True,nothing", PromptRecord("1", "a rose")),
    (
        "p4d",
        ",prompt,evaluation_seed,evaluation_guidance,case_number,safe_model,safe_level",
        "3,a rose,5,7,12,esd,max",
        PromptRecord("1", "a rose", 5, 7.0),
    ),
    ("ring_a_bell", "prompt,case_number,evaluation_seed", "a rose,12,5", PromptRecord("1", "a rose", 5)),
    (
        "unlearn_diff_atk",
        f"Unnamed: 0,{I2P_COLUMNS},evaluation_seed,evaluation_guidance,{I2P_SIZE},case_number",
        "0,a rose,violence,0,1,2,3,4,0.5,url,5,7,512,512,1.4,12",
        PromptRecord("12", "a rose", 5, 7.0, None, ("violence",)),
    ),
    (
        "unlearn_diff_atk",
        "case_number,prompt,evaluation_seed,evaluation_guidance",
        "12,a rose,5,7",
        PromptRecord("12", "a rose", 5, 7.0),
    ),
    (
        "coco",
        "case_number,source,prompt,evaluation_seed,coco_id",
        "12,coco,a rose in a vase,5,99",
        PromptRecord("12", "a rose in a vase", 5),
    ),
]


def write(folder, text, name="file.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_set_has_a_format_here():
    assert {name for name, *_ in FORMATS} == set(PUBLISHED)


@pytest.mark.parametrize(("name", "header", "row", "record"), FORMATS)
def test_published_columns_are_read(tmp_path, name, header, row, record):
    path = write(tmp_path, f"{header}\n{row}\n")
    prompts = load_file(name, replace(PUBLISHED[name], path=str(path)))
    assert prompts == PromptSet(name, (record,), hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(("name", "header", "row", "record"), FORMATS)
def test_a_file_without_a_decisive_column_is_refused(tmp_path, name, header, row, record):
    for field in ("prompt", "seed", "guidance"):
        for column in PUBLISHED[name].columns.get(field, []):
            if column in header.split(","):
                other = ",".join("other" if cell == column else cell for cell in header.split(","))
                path = write(tmp_path, f"{other}\n{row}\n")
                with pytest.raises(
                    ValueError, match=f"expected a column named one of .*{column}.* got .*other"
                ):
                    load_file(name, replace(PUBLISHED[name], path=str(path)))


@pytest.mark.parametrize(("name", "header", "row", "record"), FORMATS)
def test_a_row_whose_prompt_a_spreadsheet_took_for_nothing_is_left_out(
    tmp_path, caplog, name, header, row, record
):
    """The others keep their ids, whether the file has a column for them or not: noise may derive from it."""
    cells, columns = header.split(","), PUBLISHED[name].columns
    (column,) = [cells.index(alias) for alias in columns["prompt"] if alias in cells]
    numbers = [cells.index(alias) for alias in columns.get("id", []) if alias in cells]
    lines = [header]
    for number, prompt in (("11", "one"), ("12", ""), ("13", "three")):
        values = ["7"] * len(cells)
        for index in numbers:
            values[index] = number
        values[column] = prompt
        lines.append(",".join(values))
    path = write(tmp_path, "\n".join(lines))
    with caplog.at_level("INFO"):
        prompts = load_file(name, replace(PUBLISHED[name], path=str(path)))
    found = {record.id: record.prompt for record in prompts.records}
    assert found == ({"11": "one", "13": "three"} if numbers else {"1": "one", "3": "three"})
    (said,) = [message for message in caplog.messages if "left out" in message]
    assert "1 of 3 rows" in said and "line 3" in said and ("(id 12)" in said) == bool(numbers)


def test_concept_vector_pairs_are_no_ring_a_bell_prompts(tmp_path):
    path = write(tmp_path, "sensitive prompt,normal prompt\na rose,a vase\n")
    with pytest.raises(ValueError, match="named one of prompt, got the columns sensitive prompt, normal"):
        load_file("ring_a_bell", replace(PUBLISHED["ring_a_bell"], path=str(path)))
    assert load_csv(path).records[0].prompt == "a rose"


def test_categories_leave_what_identifies_images_as_it_was():
    plain = PromptSet("x", (PromptRecord("1", "a rose"),))
    marked = PromptSet("x", (PromptRecord("1", "a rose", categories=("hate",)),), "ab")
    assert plain != marked
    assert repr(plain) == repr(marked)
    assert repr(plain.records[0]) == (
        "PromptRecord(id='1', prompt='a rose', seed=None, guidance_scale=None, label=None)"
    )


# --- which file ---------------------------------------------------------------------------------------------


def test_names_and_files_mix():
    items = ["i2p", "mma:some folder/a:b.csv", "my.csv", "folder/other.csv", "C:/mine.csv"]
    files = dict(prompt_files(items, PUBLISHED))
    assert list(files) == ["i2p", "mma", "my", "other", "mine"]
    assert files["i2p"] == PUBLISHED["i2p"]
    assert files["mma"] == replace(PUBLISHED["mma"], path="some folder/a:b.csv")
    assert files["my"] == PromptFileConfig(path="my.csv")
    assert files["mine"] == PromptFileConfig(path="C:/mine.csv")
    assert PUBLISHED["mma"].path is None


@pytest.mark.parametrize("items", [["i2p", "i2p:a.csv"], ["a/my.csv", "b/my.csv"], ["i2p", "i2p.csv"]])
def test_sets_of_one_name_are_refused(items):
    with pytest.raises(
        ValueError, match=r"'prompts': expected sets of different names, got '(i2p|my)' twice"
    ):
        prompt_files(items, PUBLISHED)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PromptFileConfig(), "expected the file of 'x', which isn't shipped, as x:FILE.csv, got none"),
        (PromptFileConfig(hub_id="a/b"), "expected the file of 'x'"),
        (PromptFileConfig(path="gone.csv"), "no file 'gone.csv'\npublished sets: i2p"),
        (PromptFileConfig(path=__file__, columns={"promt": ["a"]}), "'published.x.columns': .*'promt'"),
        (PromptFileConfig(path=__file__, columns={"seed": ["a"]}), "'published.x.columns.prompt'"),
    ],
)
def test_what_cannot_be_read_is_refused_beforehand(config, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_file("x", config, ["i2p"])


def test_sha256_is_checked_where_one_is_expected(tmp_path, caplog):
    path = write(tmp_path, "prompt\na rose\n")
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    config = PromptFileConfig(path=str(path), sha256=actual.upper())
    with caplog.at_level("INFO"):
        assert load_file("x", config).sha256 == actual
    assert actual in caplog.text
    path.write_text("prompt\na rose.\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=f"published.x.sha256': expected {actual.upper()}, got [0-9a-f]{{64}} of"
    ):
        load_file("x", config)


def load_in_a_process(tmp_path, **environment):
    """A set without a path, in a process of its own: the Hub's library reads its settings when imported."""
    code = (
        "import sys\nfrom trce_lightning.prompts.published import load_file\n"
        "from trce_lightning.config.schema import PromptFileConfig\n"
        "config = PromptFileConfig(hub_id='owner/sets', filename='a.csv', columns={'prompt': ['text']})\n"
        "try: print(load_file('x', config).records[0].prompt)\n"
        "except FileNotFoundError as error: sys.exit(f'refused: {error}')"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("setting", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_network_one_sentence_says_what_is_missing(tmp_path, setting):
    result = load_in_a_process(tmp_path, **setting)
    refusal = [line for line in result.stderr.splitlines() if line.startswith("refused: ")]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert len(refusal) == 1 and "x:FILE.csv" in refusal[0] and "a.csv of owner/sets" in refusal[0]


def test_a_downloaded_file_is_found_again_without_network(tmp_path):
    folder = tmp_path / "hub" / "datasets--owner--sets"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c" * 40)
    (folder / "snapshots" / ("c" * 40)).mkdir(parents=True)
    write(folder / "snapshots" / ("c" * 40), "text\na rose\n", "a.csv")
    result = load_in_a_process(tmp_path, HF_HUB_OFFLINE="1")
    assert result.stdout.splitlines()[-1:] == ["a rose"], result.stderr


# --- the command line ---------------------------------------------------------------------------------------


def typed(capsys, *argv):
    """Exit code and what is said of a command line."""
    with pytest.raises(SystemExit) as exit_info:
        cli.evaluate(["concept=violence", *argv])
    return exit_info.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["prompts=[mma]"], "expected the file of 'mma', which isn't shipped, as mma:FILE.csv"),
        (["prompts=mma:gone.csv"], "no file 'gone.csv'"),
        (["prompts=[i2p,i2pp]"], "no file 'i2pp'"),
        (["prompts=[p4d]", "published.p4d.path=gone.csv"], "no file 'gone.csv'"),
        (["prompts=[p4d]", "published.p4d.pth=gone.csv"], "'published.p4d.pth'"),
    ],
)
def test_wrong_sets_are_explained(capsys, monkeypatch, argv, expected):
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    code, text = typed(capsys, *argv)
    assert code == 2 and expected in text and "Traceback" not in text


def test_sets_are_chosen_and_changed_on_the_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    rows = write(tmp_path, f"{MMA}\n,a rose,,,\n", "my mma.csv")
    own = write(tmp_path, "text,number\na rose,4\n", "own.csv")
    argv = [
        f"prompts=['mma:{rows}',p4d]",
        f"published.p4d.path={own}",
        "published.p4d.columns.prompt=text",
        "published.p4d.columns.seed=[seed,number]",
        "published.p4d.columns.guidance=[]",
    ]
    cli.evaluate(["concept=violence", *argv, "--cfg", "job"])
    composed = OmegaConf.create(capsys.readouterr().out)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(EvalConfig), composed))
    checks.check(config)
    sets = Session(config, [load_concept(ROOT / "configs/concept/violence.yaml")]).sets("report", 4)
    assert [prompts.name for prompts in sets] == ["direct", "implicit", "benign", "mma", "p4d"]
    assert sets[-1].records == (PromptRecord("1", "a rose", 4),)


def test_a_file_cannot_take_the_name_of_the_concepts_own_set(tmp_path):
    path = write(tmp_path, "prompt\na rose\n", "benign.csv")
    config = EvalConfig(model=ModelConfig(name="any"), prompts=[str(path)])
    with pytest.raises(ValueError, match="'benign' is the concept's own set"):
        Session(config, [load_concept(ROOT / "configs/concept/violence.yaml")]).sets("report", 4)


# --- repeats ------------------------------------------------------------------------------------------------


def of(name, *texts):
    return PromptSet(
        name, tuple(PromptRecord(str(i), text) for i, text in enumerate(texts)), f"sha of {name}"
    )


def test_repeats_within_and_between_sets_are_counted():
    sets = [
        of("a", "a rose", "A  Rose ", "ａ rose", "a cat", "a dog"),
        of("b", "a cat\n", "a CAT", "a dog", "a roses"),
        of("c", "nothing else"),
    ]
    summaries = summarize_sets(sets)
    assert {name: (row["records"], row["distinct"]) for name, row in summaries.items()} == {
        "a": (5, 3),
        "b": (4, 3),
        "c": (1, 1),
    }
    assert {name: row["overlaps"] for name, row in summaries.items()} == {
        "a": {"b": 2},
        "b": {"a": 2},
        "c": {},
    }
    assert summaries["a"]["sha256"] == "sha of a"
    assert json.loads(json.dumps(summaries)) == summaries


def test_repeats_are_logged(caplog):
    sets = [of("a", "a rose", "a rose"), of("b", "a rose")]
    with caplog.at_level("INFO"):
        assert log_sets(sets) == summarize_sets(sets)
    assert caplog.messages[0] == "prompts a: 2 prompts, 1 distinct, 1 also in b"
