"""``python -m trce_lightning.leaderboard``: cells are run once, continue and are shared; the page."""

import csv
import json
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.leaderboard import chosen_trials, joined_tables, load_rows, sections
from trce_lightning import cli
from trce_lightning.adapters import load_adapter
from trce_lightning.config.composition import compose
from trce_lightning.config.schema import LeaderboardConfig, TrainConfig
from trce_lightning.errors import InputError
from trce_lightning.jobs import leaderboard as job
from trce_lightning.jobs.erase import MethodRun, unread_options
from trce_lightning.jobs.leaderboard import Board, Cell, leaderboard
from trce_lightning.report.leaderboard import (
    Row,
    _mean_over_attacks,
    front,
    markdown,
    rows_of,
    titles_of,
    write_leaderboard,
)
from trce_lightning.runtime.locks import LOCK, claimed

ROOT = Path(__file__).parents[1]
SMALL = (
    "trainer=cpu",
    "trainer.enable_progress_bar=false",
    "images_per_set=2",
    "methods=[uce]",
    "guidances=[]",
    "seeds=[0]",
    "attacks=[]",
    # Without prompts to keep, no text encoder reads 2,000 prompts.
    "++overrides.uce.method.keep=empty",
    "model.num_inference_steps=2",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original's scores, which all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def erased(monkeypatch: pytest.MonkeyPatch, clean_process: None) -> list[str]:
    """The titles of cells that were run, in order."""
    titles: list[str] = []
    whole = Cell._facts

    def noted(self: Cell) -> dict[str, Any]:
        titles.append(self.title)
        return whole(self)

    monkeypatch.setattr(Cell, "_facts", noted)
    return titles


def config_of(folder: Path, cache: Path, *overrides: str) -> LeaderboardConfig:
    options = [*SMALL, f"output={folder / 'board'}", f"cache={cache}"]
    config = compose("leaderboard", LeaderboardConfig, [*options, *overrides])
    assert isinstance(config, LeaderboardConfig)
    return config


def lines_of(folder: Path) -> dict[str, dict[str, str]]:
    """The lines of the CSV by method."""
    with (folder / "board" / "leaderboard.csv").open() as stream:
        return {line["method"]: line for line in csv.DictReader(stream) if line["kind"] != "published"}


def test_a_cell_is_run_once_a_method_more_runs_alone_and_the_table_has_what_runs_have(
    tmp_path: Path, cache: Path, erased: list[str]
) -> None:
    leaderboard(config_of(tmp_path, cache))
    leaderboard(config_of(tmp_path, cache))
    assert erased == ["uce, violence, seed 0"]
    leaderboard(config_of(tmp_path, cache, "guidances=[sld_max]"))
    assert erased == ["uce, violence, seed 0", "sld_max, violence, seed 0"]
    (run,) = (tmp_path / "board").glob("violence/uce/*/erase")
    metrics, lines = json.loads((run / "metrics.json").read_text()), lines_of(tmp_path)
    for name, label in (("uce", "erased"), ("original", "original")):
        scores = metrics[label]
        assert float(lines[name]["asr_direct"]) == scores["asr"]["direct"]["rate"]
        assert float(lines[name]["asr_implicit"]) == scores["asr"]["implicit"]["rate"]
        assert float(lines[name]["fid"]) == pytest.approx(scores["fid"])
        assert float(lines[name]["clip_score"]) == pytest.approx(scores["clip_score"])
        assert float(lines[name]["benign_accuracy"]) == scores["benign_accuracy"]
    assert int(float(lines["uce"]["trainable"])) == metrics["method"]["trainable"] > 0
    assert float(lines["uce"]["delta_bytes"]) == (run / "delta.safetensors").stat().st_size
    assert lines["sld_max"]["kind"] == "guidance" and "attacked" not in lines["sld_max"]
    per_image = [float(lines[name]["evaluations_per_image"]) for name in ("original", "sld_max")]
    assert per_image[1] == 1.5 * per_image[0]
    left = {file.name for file in run.parent.rglob("*") if file.is_dir()}
    assert not left & {"erased", "images", "attacks", "checkpoints"}, "what is large is deleted"
    page = (tmp_path / "board" / "leaderboard.html").read_text()
    assert page.count("<tr data-concept") == 3 and "TRCE, Table 1" in page


def test_a_method_without_random_numbers_has_one_seed(tmp_path: Path, cache: Path) -> None:
    config = config_of(tmp_path, cache, "methods=[uce,esd,trce]", "guidances=[sld]", "seeds=[3,4]")
    cells = [(cell.method, cell.seed) for cell in Board(config).cells]
    assert cells == [("uce", 3), ("esd", 3), ("esd", 4), ("trce", 3), ("trce", 4), ("sld", 3)]


def test_a_killed_cell_continues(
    tmp_path: Path, cache: Path, erased: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends after erasing, before its result is written."""
    trained: list[str] = []
    train = job.train

    def counting(config: Any) -> None:
        trained.append(config.output)
        train(config)

    monkeypatch.setattr(job, "train", counting)
    monkeypatch.setattr(job, "erase_seconds", lambda metrics, work: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        leaderboard(config_of(tmp_path, cache))
    assert len(trained) == 1 and not list((tmp_path / "board").glob("**/cell.json"))
    monkeypatch.setattr(job, "erase_seconds", lambda metrics, work: 3.0)
    leaderboard(config_of(tmp_path, cache))
    assert len(trained) == 1, "it erased again"
    assert float(lines_of(tmp_path)["uce"]["erase_seconds"]) == 3


def test_a_run_that_was_stopped_goes_on_and_one_with_another_cache_begins_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method's run writes other stages than its configuration had."""
    fresh: list[bool] = []
    train = job.train

    def stopped(config: Any) -> None:
        """Train, and leave what a run leaves that was stopped before its end."""
        fresh.append(config.fresh)
        train(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "train", stopped)
    for own in (cache, cache, tmp_path / "other"):
        for file in (tmp_path / "board").glob("violence/uce/*/erase/metrics.json"):
            file.unlink()
        with pytest.raises(KeyboardInterrupt):
            leaderboard(config_of(tmp_path, own))
    assert fresh == [False, False, True]


def test_other_attacks_erase_nothing_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The changed tensors make the attacked pipeline each time, and it equals the erased model."""
    erased: list[dict[str, Tensor]] = []
    whole = MethodRun.write

    def writing(self: MethodRun) -> None:
        erased.append({name: tensor.clone() for name, tensor in self.adapter.denoiser.state_dict().items()})
        whole(self)

    monkeypatch.setattr(MethodRun, "write", writing)
    leaderboard(config_of(tmp_path, cache))
    attacked: list[dict[str, Tensor]] = []

    def attack(self: Cell, pipeline: Path) -> dict[str, Any]:
        attacked.append(load_adapter(pipeline).denoiser.state_dict())
        return {}

    monkeypatch.setattr(Cell, "_attacked", attack)
    monkeypatch.setattr(job.Group, "refer", lambda self: None)
    first = config_of(tmp_path, cache, "attacks=[completion]")
    second = config_of(tmp_path, cache, "attacks=[completion]", "attack.completion.num_steps=9")
    cells = [cell for config in (first, second) for cell in Board(config).cells]
    assert cells[0].folder == cells[1].folder and cells[0].place != cells[1].place
    work = cells[0].work_left
    assert work.scores == sum(work.erase.values()) == 0 < work.attacks
    leaderboard(first)
    with claimed(cells[0].place / LOCK):  # another process is at the first cell
        leaderboard(second)
    assert len(erased) == 1 and len(attacked) == 2
    for own in attacked:
        assert all(torch.equal(own[name], tensor) for name, tensor in erased[0].items())


def test_a_cell_of_another_process_is_left_to_it(tmp_path: Path, cache: Path, erased: list[str]) -> None:
    board = Board(config_of(tmp_path, cache))
    (cell,) = board.cells
    with claimed(cell.place / LOCK) as is_ours:
        assert is_ours and not cell.run()
    assert erased == []


def test_shards_share_out_the_cells_and_the_page_has_those_of_all(tmp_path: Path, cache: Path) -> None:
    more = ("seeds=[0,1,2]", "guidances=[sld,safree]", "shards=2")
    every = Board(config_of(tmp_path, cache, *more))
    parts = [Board(config_of(tmp_path, cache, *more, f"shard={shard}")).own for shard in (0, 1)]
    titles = [[cell.title for cell in part] for part in parts]
    assert sorted(titles[0] + titles[1]) == sorted(cell.title for cell in every.cells)
    assert len(titles[0]) == 2 and len(every.cells) == 3, "uce and rules of guidance have one seed"


def test_a_result_of_another_machine_is_found(tmp_path: Path, cache: Path) -> None:
    """Neither the device nor the place of caches enters a cell's name; what decides images does."""
    (cell,) = Board(config_of(tmp_path, cache)).cells
    (alike,) = Board(config_of(tmp_path, tmp_path, "trainer.accelerator=auto", "batch_size=7")).cells
    assert alike.file == cell.file
    for change in (
        "images_per_set=3",
        "seeds=[1]",
        "attacked_prompts=7",
        "model.num_inference_steps=3",
        "++overrides.uce.method.ridge=2",
    ):
        (other,) = Board(config_of(tmp_path, cache, change)).cells
        assert other.file != cell.file, change


def test_only_trce_is_run_again_if_its_own_options_change(tmp_path: Path, cache: Path) -> None:
    """A new default of stage 2 costs no user the hours of eleven other methods."""
    for cell in Board(config_of(tmp_path, cache, "methods=[uce,trce]")).cells:
        config, unread = cell.train_config, unread_options(cell.train_config)
        changed = replace(config, trajectory=replace(config.trajectory, epochs=1))
        moved = job.hash_of(changed, unread) != job.hash_of(config, unread)
        assert moved == (cell.method == "trce")


def test_a_new_option_moves_no_cell_until_it_has_another_value(tmp_path: Path, cache: Path) -> None:
    """Otherwise each version of this program would cost its users the hours of all methods."""
    board = Board(config_of(tmp_path, cache, "methods=[uce,hardened]"))
    config = board.cells[-1].train_config
    assert config.method["name"] == "hardened"

    @dataclass
    class Grown(TrainConfig):
        new: int = 3

    values = {each.name: getattr(config, each.name) for each in fields(config)}
    assert job.hash_of(Grown(**values)) == job.hash_of(config)
    assert job.hash_of(Grown(**values, new=4)) != job.hash_of(config)
    # Those of a method and of a group may lack an option that came later.
    assert config.method["scenes"] is True, "the default"
    older = {name: value for name, value in config.method.items() if name != "scenes"}
    assert job.hash_of(replace(config, method=older)) == job.hash_of(config)
    assert job.hash_of(replace(config, method=config.method | {"scenes": False})) != job.hash_of(config)
    for group, option in (
        ("textual", "eta"),
        ("trajectory", "beta"),
        ("optimizer", "lr"),
        ("metrics", "samples_per_prompt"),
    ):
        own = getattr(config, group)
        other = replace(config, **{group: replace(own, **{option: getattr(own, option) + 1})})
        assert job.hash_of(other) != job.hash_of(config), option


def test_a_refused_cell_lets_the_others_run_and_ends_the_command(
    tmp_path: Path, cache: Path, erased: list[str]
) -> None:
    wrong = ("methods=[esd]", "~overrides.uce", "guidances=[sld_max]", "++overrides.esd.method.last_step=99")
    with pytest.raises(InputError, match="1 cells were refused, such as esd, violence, seed 0: "):
        leaderboard(config_of(tmp_path, cache, *wrong))
    assert erased == ["sld_max, violence, seed 0"]
    assert "sld_max" in lines_of(tmp_path)


def test_a_plan_counts_and_leaves_nothing(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "set_up_logging", lambda: None)
    caplog.set_level("INFO")
    config = config_of(
        tmp_path, cache, "plan=true", "methods=[trce,uce]", "attacks=[completion]", "attacked_prompts=2"
    )
    leaderboard(config)
    assert "2 cells, 2 of them of this shard, 0 done" in caplog.text
    counts = {
        record.args[0]: record.args[1] for record in caplog.records if record.msg.startswith("ahead: %-16s")
    }
    assert set(counts) == {"erasing", "scores", "attacks, about"} and all(counts.values())
    assert "measured from the network alone" in caplog.text
    assert not (tmp_path / "board").exists()


def test_concepts_are_names_files_or_several(tmp_path: Path) -> None:
    file = tmp_path / "guns.yaml"
    file.write_text("name: guns\nterms: {a gun: a kite}\ntemplates: ['{}']\n")
    assert list(job.concept_configs(f"violence+{file}")) == ["violence", "guns"]
    with pytest.raises(InputError, match=r"'concepts': expected names among.*'violense'.*'violence'"):
        job.concept_configs("violense")
    with pytest.raises(InputError, match="each concept once"):
        job.concept_configs("horror+horror")


@pytest.mark.slow
def test_two_processes_at_once_share_the_cells_and_do_no_work_twice(tmp_path: Path) -> None:
    options = [option for option in SMALL if not option.startswith(("seeds", "attacks", "trainer="))]
    options += ["trainer.accelerator=cpu", "trainer.precision=32-true", "seeds=[0,1]", "attacks=[completion]"]
    options += [
        "attacked_prompts=2",
        f"runs={tmp_path}",
        "attack.completion.num_steps=8",
        "attack.completion.steps=[2]",
    ]
    command = [sys.executable, "-m", "trce_lightning.leaderboard", *options]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    cells = list(tmp_path.glob("leaderboard/violence/uce/*/*/cell.json"))
    assert len(cells) == 2
    erasings = [text.count("erasing violence from emoji") for text in said]
    assert sum(erasings) == 2, "each cell was erased once"
    # The references were attacked by one process, and the other one found their images.
    searches = sum(text.count("re-initialised: completion, control") for text in said)
    assert searches <= 1 and len(list(tmp_path.glob("cache/attacks/original-*"))) == 1
    rows = json.loads((tmp_path / "leaderboard" / "leaderboard.json").read_text())["rows"]
    uce = next(row for row in rows if row["method"] == "uce")
    assert uce["seeds"] == [0, 1] and uce["metrics"]["fid"].keys() == {"value", "low", "high"}
    own = [json.loads(cell.read_text())["attacks"]["completion"]["rate"] for cell in cells]
    assert uce["metrics"]["attack_completion"]["value"] == pytest.approx(sum(own) / 2)
    assert "rho_completion" in uce["metrics"]


# The page.


def interval(value: float, low: float | None = None, high: float | None = None) -> dict[str, float]:
    return {"value": value} | ({} if low is None or high is None else {"low": low, "high": high})


ROWS = [
    Row(
        "violence",
        "original",
        "reference",
        (),
        {
            "asr_direct": interval(1.0, 0.9, 1.0),
            "asr_implicit": interval(1.0),
            "fid": interval(8.0),
            "attacked": interval(1.0),
        },
    ),
    Row("violence", "never-learnt", "reference", (), {"attacked": interval(0.1)}),
    Row(
        "violence",
        "<b>esd",
        "method",
        (0, 1),
        {
            "asr_direct": interval(0.1, 0.05, 0.2),
            "asr_implicit": interval(0.2),
            "fid": interval(9.0, 8.5, 9.5),
            "attacked": interval(0.4),
            "delta_bytes": interval(2_500_000),
        },
    ),
]


def test_the_front_is_what_nothing_beats() -> None:
    points = [(2.0, 1.0), (1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (4.0, 0.5)]
    assert front(points) == [1, 0, 4]
    assert front([]) == []


def test_headings_and_cells_have_their_units() -> None:
    assert list(titles_of(ROWS)) == ["asr_direct", "asr_implicit", "attacked", "fid", "delta_bytes"]
    lines = markdown(ROWS, ["asr_direct", "fid", "delta_bytes"]).splitlines()
    assert lines[0] == "|  | ASR direct, % | FID | stored, MB |"
    assert lines[2] == "| original | 100.0 [90.0, 100.0] | 8.00 | – |"
    assert lines[4] == "| <b>esd | 10.0 [5.0, 20.0] | 9.00 [8.50, 9.50] | 2.5 |"


def test_rows_pool_seeds_and_leave_out_seconds_that_are_not_whole() -> None:
    def cell(seed: int, hit: float, seconds: float | None) -> dict[str, Any]:
        values = {"asr_direct": {"prompts": [0, 1], "values": [hit, 0.0]}}
        return {
            "kind": "method",
            "method": "esd",
            "seed": seed,
            "values": values,
            "scores": {"fid": 8.0 + seed},
            "hits": {"noise": {"p": [bool(hit)], "q": [False]}},
            "erase_seconds": seconds,
            "network_evaluations": {"forward": 10, "backward": 20},
        }

    hits = {
        "original": {"noise": {"p": [True], "q": [True]}},
        "never-learnt": {"noise": {"p": [False], "q": [False]}},
    }
    references = {"concepts": ["violence", "horror"], "hits": hits, "values": {}, "scores": {"fid": 7.0}}
    first, never, esd = rows_of(references, [cell(0, 1.0, 4.0), cell(1, 0.0, None)])
    assert (first.method, never.method, esd.method) == ("original", "never-learnt", "esd")
    assert esd.concept == "violence+horror" and esd.seeds == (0, 1)
    assert esd.value("asr_direct") == 0.25 and esd.value("fid") == 8.5 and esd.value("erase_seconds") == 4
    assert esd.value("attack_noise") == 0.25 == esd.value("rho_noise") == esd.value("attacked")
    assert (esd.value("forward"), esd.value("backward")) == (10, 20)
    assert first.value("attack_noise") == 1 and never.value("attack_noise") == 0


def test_docs_get_the_lowest_asr_first_and_the_chosen_trials(tmp_path: Path) -> None:
    write_leaderboard(tmp_path, [*reversed(ROWS)], [], {}, [])
    rows = load_rows(tmp_path)
    assert [row.method for row in rows] == ["original", "never-learnt", "<b>esd"]
    text = sections(rows, {"violence": "x.png"})
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert "![violence: ASR and attacks against FID](x.png)" in text
    assert [line.split(" | ")[0] for line in tables[0][2:]] == ["| original", "| never-learnt", "| <b>esd"]
    assert tables[-1][0] == "|  | stored, MB |" and len(tables[-1]) == 3
    unattacked = [replace(row, metrics={"fid": {"value": 8.0}}) for row in rows]
    assert sections(unattacked, {"violence": "x.png"}).count("| --- |") == 1, "no table without columns"
    (tmp_path / "t.csv").write_text(
        "method,trial,chosen,loss,asr_direct,asr_implicit,fid,benign_accuracy,options\n"
        "original,0,0,,1.0,0.97,8.0,1.0,{}\n"
        'esd,0,0,0.5,0.5,0.5,8.1,0.9,"{""method.lr"": 0.1}"\n'
        'esd,1,1,0.2,0.25,0.15,8.2,0.95,"{""method.lr"": 0.2, ""method.eta"": 1}"\n'
    )
    lines = chosen_trials(tmp_path / "t.csv").splitlines()
    assert len(lines) == 4
    assert lines[3] == "| esd | 2 | 1 | 0.2 | 25 %, 15 % | 8.2 | 95 % | lr=0.2, eta=1 |"


def test_tables_of_other_concepts_with_other_columns_are_joined(tmp_path: Path) -> None:
    (first := tmp_path / "1.csv").write_text("concept,fid,attacked\nviolence,8.0,0.1\n")
    (second := tmp_path / "2.csv").write_text('concept,fid,note\nhorror,9.0,"a, b"\n')
    joined = joined_tables([first, second])
    assert joined == 'concept,fid,attacked,note\nviolence,8.0,0.1,\nhorror,9.0,,"a, b"\n'


def test_the_mean_over_attacks_is_over_those_that_scored_a_prompt() -> None:
    by_attack = {"mma": {"a": [True], "b": [True, False]}, "relearning": {"b": [True]}}
    for order in (by_attack, dict(reversed(by_attack.items()))):
        assert sorted(_mean_over_attacks(order).values) == [0.75, 1.0]


@pytest.mark.browser
def test_a_heading_sorts_and_what_is_absent_comes_last(tmp_path: Path, page: Any) -> None:
    write_leaderboard(tmp_path, ROWS, [], {"commit": "x"}, [])
    page.goto((tmp_path / "leaderboard.html").as_uri())
    names = lambda: page.locator("#board tbody tr th").all_inner_texts()  # noqa: E731
    page.get_by_role("button", name="FID").click()
    assert [name.split()[0] for name in names()] == ["original", "<b>esd", "never-learnt"]
    assert page.locator("#board thead [aria-sort=ascending]").inner_text().startswith("FID")
    page.get_by_role("button", name="FID").click()
    assert [name.split()[0] for name in names()] == ["<b>esd", "original", "never-learnt"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["methods=[esdd]"], ["'methods'", "'esdd'", "Did you mean 'esd'?"]),
        (["methods=[esd]", "++overrides.esd.lr=1e-3"], ["'lr'", "option of train"]),
        (["methods=[esd]", "++overrides.esd.metrics.lr=1"], ["'metrics.lr'", "option of train"]),
        (["methods=[esd]", "++overrides.esd.optimizer.lr=1"], ["'optimizer.lr'", "beside method=esd"]),
        (["methods=[trce]", "++overrides.trce.trajectory.beta=-3"], ["'trajectory.beta'", "-3"]),
        (["methods=[trce]", "++overrides.trce.trajectory.epochs=many"], ["'trajectory.epochs'", "many"]),
        (["guidances=[sld]", "++overrides.sld.stages=[textual]"], ["'stages'", "option of eval"]),
        (["model.judge=clip", "model.clip=folder", "concepts=[style]"], ["'model.judge'", "no style"]),
        (["methods=[all,esdd]"], ["'methods'", "'esdd'"]),
        (["guidances=[sldd]"], ["'guidances'", "'sldd'"]),
        (["concepts=[violense]"], ["'concepts'", "'violense'"]),
        (["shard=3", "shards=3"], ["'shard'", "less than shards, 3", "got 3"]),
        (["seeds=[1,1]"], ["'seeds'", "at most once", "[1, 1]"]),
        (["methods=[]", "guidances=[]"], ["'methods'", "got none"]),
        (["trainer.devices=2"], ["'trainer.devices'", "one device"]),
        (["images_per_set=1"], ["'images_per_set'", "at least 2"]),
        (["overrides.mace2.method.lr=1"], ["'overrides'", "mace2"]),
        (["++overrides.esd.trainer.gradient_clip_val=1"], ["'overrides.esd'", "trainer", "for all"]),
        (["++overrides.esd=5"], ["'overrides.esd'", "by their names", "got 5"]),
        (["++overrides.sld.model.guidance_scale=5"], ["'overrides.sld'", "model"]),
        (["++overrides.esd.metrics.batch_size=5"], ["'overrides.esd'", "metrics.batch_size"]),
        (["attacks=[mmaa]"], ["no attacks named 'mmaa'"]),
    ],
)
def test_wrong_options_are_explained(
    argv: list[str], expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.leaderboard([f"runs={tmp_path}", "plan=true", *argv])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert all(part in said for part in expected), said
    assert not any(tmp_path.iterdir())
