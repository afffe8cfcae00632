"""Concept files by a language model, against a server that speaks the protocol."""

import dataclasses
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from trce_lightning.api import compose
from trce_lightning.concepts import Concept, load_concept
from trce_lightning.concepts.chat import EndpointChat
from trce_lightning.concepts.defaults import DEFAULT_TEMPLATES
from trce_lightning.concepts.draft import Reply, Wanted, parse
from trce_lightning.concepts.naming import mentions
from trce_lightning.expand import main, write_concept

Step = tuple[int, dict[str, str], str]  # status, headers, body
TERMS = {"a dagger": "a rose", "a machete": "a guitar", "a stabbing": "a handshake"}


def said(content: object, **message: object) -> Step:
    """A completion whose message is a text, or JSON."""
    text = content if content is None or isinstance(content, str) else json.dumps(content)
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    choice["message"].update(message)
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return 200, {}, json.dumps(body)


def listing(terms: dict[str, Any], **more: object) -> dict[str, object]:
    return {"terms": [{"term": term, "counterpart": safe} for term, safe in terms.items()], **more}


def refusal(status: int, message: str, **headers: str) -> Step:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": message, "type": "t", "code": "c"}})


@dataclass
class Server:
    """Answers with `steps` in turn, the last for ever, and notes what it was asked and when."""

    url: str
    steps: list[Step] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    hanging: bool = False
    closing: threading.Event = field(default_factory=threading.Event)

    def prompt(self, index: int) -> str:
        return self.asked[index]["messages"][-1]["content"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            server.times.append(time.monotonic())
            server.keys.append(self.headers["Authorization"])
            assert self.path == "/v1/chat/completions"
            server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if server.hanging:
                server.closing.wait(30)
                return
            status, headers, body = server.steps.pop(0) if len(server.steps) > 1 else server.steps[0]
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}/v1")
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    yield server
    server.closing.set()
    http.shutdown()
    http.server_close()


def run(out: Path, *options: str, concept: str = "knife crime", terms: int = 3) -> None:
    main([concept, "--model", "gpt-x", "--out", str(out), "--terms", str(terms), *options])


def fails(capsys: pytest.CaptureFixture[str], out: Path, *options: str, **more: Any) -> str:
    """The one line of an expected failure, which leaves no file."""
    with pytest.raises(SystemExit) as stop:
        run(out, *options, **more)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    assert "secret" not in line
    assert not out.exists() and not list(out.parent.iterdir())
    return line


def test_a_good_reply_becomes_a_concept_file(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    server.steps = [said(listing(TERMS, related=["not asked for"]))]
    run(tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text().startswith("# @package concept.knife_crime\n")
    concept = load_concept(tmp_path / "mine.yaml")
    assert dict(concept.terms) == TERMS
    assert concept.name == "knife_crime" and concept.templates == DEFAULT_TEMPLATES["subject"]
    assert concept.source == "gpt-x at 127.0.0.1"
    assert not concept.related and not concept.neighbours and not concept.wordings
    assert len(concept.pairs()) == 45
    (asked,) = server.asked
    assert asked["model"] == "gpt-x" and asked["response_format"]["type"] == "json_schema"
    assert Reply.model_json_schema() == asked["response_format"]["json_schema"]["schema"]
    assert "knife crime" in server.prompt(0) and "List 3 " in server.prompt(0)
    assert server.keys == ["Bearer secret"]
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.yaml"]
    assert "for 3 terms" in caplog.text and "3/3" in capsys.readouterr().err


def test_a_style_is_asked_for_as_a_style(server: Server, tmp_path: Path) -> None:
    terms = {"cubism": "plain", "cubist": "photographic", "Picasso": "an unknown painter"}
    server.steps = [said(listing(terms))]
    run(tmp_path / "mine.yaml", "--kind", "style", "--templates", "4")
    concept = load_concept(tmp_path / "mine.yaml")
    assert concept.kind == "style" and dict(concept.terms) == terms
    assert concept.templates == DEFAULT_TEMPLATES["style"][:4]
    assert "another way of drawing" in server.prompt(0) and "dagger" not in server.prompt(0)


def test_wordings_neighbours_and_related_keep_what_fits(server: Server, tmp_path: Path) -> None:
    reply = listing(
        TERMS,
        neighbours=["A fork", "a fork", "a daggers drawn pub", "a butter knife", "???", " a spoon"],
        related=["stabbed", "Stabbed", "the machete", "rose", "blade\nrunner"],
    )
    reply["terms"][0]["wordings"] = ["a blade", "the blade", "A DAGGER", "a guitar", "a sharp dagger"]
    server.steps = [said(reply)]
    run(tmp_path / "mine.yaml", "--also", "wordings", "neighbours", "related", "--name", "knives")
    concept = load_concept(tmp_path / "mine.yaml")
    assert concept.name == "knives"
    assert dict(concept.wordings) == {"a dagger": ("a blade", "a sharp dagger")}
    assert concept.neighbours == ("a fork", "a spoon")
    assert concept.related == ("stabbed",)  # "rose" is in a counterpart
    assert not any(mentions(pair.safe, [concept]) for pair in concept.pairs())
    assert all(word in server.prompt(0) for word in ("wordings", "neighbours", "related"))


def test_duplicates_are_dropped_and_others_asked_for(server: Server, tmp_path: Path) -> None:
    first = {"a dagger": "a rose", "A Dagger": "a tulip", "the daggers": "tulips", "dagger": "a daisy"}
    server.steps = [said(listing(first)), said(listing({"DAGGER": "a lily", "a machete": "a guitar"}))]
    run(tmp_path / "mine.yaml", "--attempts", "1", terms=2)
    assert dict(load_concept(tmp_path / "mine.yaml").terms) == {
        "a dagger": "a rose",
        "a machete": "a guitar",
    }
    assert "List 1 " in server.prompt(1)
    assert "give others: a dagger" in server.prompt(1)
    assert "'A Dagger' again" in server.prompt(1)


def test_more_terms_than_wanted_are_cut(server: Server, tmp_path: Path) -> None:
    server.steps = [said(listing(TERMS))]
    run(tmp_path / "mine.yaml", "--templates", "4", terms=2)
    concept = load_concept(tmp_path / "mine.yaml")
    assert list(concept.terms) == list(TERMS)[:2] and concept.templates == DEFAULT_TEMPLATES["subject"][:4]


@pytest.mark.parametrize(
    "garbage",
    [
        said("I would rather talk of flowers."),
        said(None, refusal="I would rather talk of flowers."),
        said(""),
        said('{"terms": ['),
        said('{"flowers": []}'),
        said('{"terms": {"a dagger": "a rose"}}'),
        said({"terms": []}),
        said(listing({"a dagger": None})),
        said({"terms": [{"term": "a dagger"}]}),
        said(listing({"a ${dagger}": "a rose"})),
        said(listing({"a dagger": "a\nrose"})),
        said(listing({"a dagger": "..."})),
        said(listing({"a dagger" * 20: "a rose"})),
    ],
)
def test_garbage_is_asked_for_again_with_the_reason(server: Server, tmp_path: Path, garbage: Step) -> None:
    server.steps = [garbage, garbage, said(listing(TERMS))]
    run(tmp_path / "mine.yaml")
    assert dict(load_concept(tmp_path / "mine.yaml").terms) == TERMS
    assert len(server.asked) == 3
    assert "this was wrong" not in server.prompt(0)
    assert re.search(r"In your last reply this was wrong: .*expected", server.prompt(1))


def test_nothing_but_garbage_ends_after_the_attempts(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.steps = [said("I cannot help with that.")]
    line = fails(capsys, tmp_path / "mine.yaml", "--attempts", "2")
    assert "--terms: expected 3, got 0 from gpt-x at 127.0.0.1, whose last 2 replies" in line
    assert "I cannot help with that." in line
    assert len(server.asked) == 2


def test_too_few_terms_write_no_file(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.steps = [said(listing({"a dagger": "a rose"}))]
    assert "--terms: expected 3, got 1 " in fails(capsys, tmp_path / "mine.yaml")
    assert len(server.asked) == 4  # one that brings a term, then three that don't


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ({"a dagger": "a butter knife"}, "neither 'knife crime' nor a term, got 'a butter knife' for"),
        ({"a dagger": "Crimes"}, "neither 'knife crime' nor a term, got 'Crimes'"),
        ({"a dagger": "a wooden dagger"}, "nor a term, got 'a wooden dagger' for 'a dagger'"),
        ({"a machete": "a toy dagger", "a dagger": "a rose"}, "nor a term, got 'a toy dagger' for 'a mach"),
        ({"a dagger": "a rose", "a rose": "a lily"}, "nor a term, got 'a rose' for 'a dagger'"),
        ({"a dagger": ""}, "expected short plain phrases, got ''"),
    ],
)
def test_counterpart_names_neither_concept_nor_term(
    server: Server, tmp_path: Path, terms: dict[str, str], reason: str
) -> None:
    server.steps = [said(listing(terms)), said(listing(TERMS))]
    run(tmp_path / "mine.yaml")
    assert reason in server.prompt(1)
    concept = load_concept(tmp_path / "mine.yaml")
    assert len(concept.terms) == 3
    assert not re.search("knife|crime", " ".join(concept.terms.values()), re.IGNORECASE)
    assert not any(mentions(safe, [concept]) for safe in concept.terms.values())


def test_term_that_an_earlier_counterpart_names_is_refused(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.steps = [said(listing({"a dagger": "a rose"})), said(listing({"the roses": "a lily", **TERMS}))]
    run(tmp_path / "mine.yaml")
    assert list(load_concept(tmp_path / "mine.yaml").terms) == list(TERMS)
    assert "expected a term that no counterpart names, got 'the roses'" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "```json\n%s\n```",
        "Sure! %s Enjoy.",
        '<think>{"terms": 3}? No.</think>%s',
    ],
)
def test_json_is_found_in_what_surrounds_it(text: str) -> None:
    assert [entry.term for entry in parse(text % json.dumps(listing(TERMS))).terms] == list(TERMS)


def test_words_that_yaml_would_misread_survive(server: Server, tmp_path: Path) -> None:
    terms = {"no": "1e3", "12:30": "null", "a dagger: the # second": "été — 'a' \"rose\""}
    server.steps = [said(listing(terms))]
    run(tmp_path / "mine.yaml")
    assert dict(load_concept(tmp_path / "mine.yaml").terms) == terms


def test_rate_limit_is_waited_out(server: Server, tmp_path: Path) -> None:
    server.steps = [refusal(429, "slow down", Retry_After="1"), said(listing(TERMS))]
    run(tmp_path / "mine.yaml")
    assert len(load_concept(tmp_path / "mine.yaml").terms) == 3
    assert 0.95 < server.times[1] - server.times[0] < 5  # without the header, under 0.5 s


@pytest.mark.parametrize(
    ("step", "asked", "message"),
    [
        (
            refusal(429, "slow\ndown", retry_after_ms="5", Retry_After="7"),
            3,
            r"\(429, Retry-After 7\).*slow d",
        ),
        (refusal(429, "quota", Retry_After="9000"), 1, "429, Retry-After 9000.*quota"),
        (refusal(503, "overloaded", retry_after_ms="5"), 3, "127.0.0.1: .*overloaded"),
        (refusal(401, "bad key"), 1, "OPENAI_API_KEY: expected a key for 127.0.0.1, got: bad key"),
        (refusal(404, "no such model"), 1, "--model, .*got 'gpt-x' at .*no such model"),
        (refusal(400, "bad request"), 2, "127.0.0.1: .*bad request"),  # with a schema and without
        ((200, {}, "[]"), 1, "OPENAI_BASE_URL: expected the URL of a chat-completions endpoint"),
        ((200, {}, '{"choices": []}'), 1, "OPENAI_BASE_URL: expected"),
        ((200, {}, '{"choices": [{}]}'), 1, "OPENAI_BASE_URL: expected"),
        ((200, {}, "<html>"), 1, "OPENAI_BASE_URL: expected"),
        ((200, {"Content-Type": "text/html"}, "<html>"), 1, "OPENAI_BASE_URL: expected .*<html>"),
    ],
)
def test_endpoint_that_does_not_answer_is_one_sentence(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: Step, asked: int, message: str
) -> None:
    server.steps = [step]
    assert re.search(message, fails(capsys, tmp_path / "mine.yaml", "--retries", "2"))
    assert len(server.asked) == asked


def test_server_that_takes_no_schema_is_asked_without(server: Server, tmp_path: Path) -> None:
    server.steps = [refusal(400, "response_format: unknown"), said("no"), said(listing(TERMS))]
    run(tmp_path / "mine.yaml")
    assert len(load_concept(tmp_path / "mine.yaml").terms) == 3
    assert ["response_format" in asked for asked in server.asked] == [True, False, False]


def test_hanging_server_times_out(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.hanging = True
    line = fails(capsys, tmp_path / "mine.yaml", "--timeout", "0.2", "--retries", "1")
    assert "127.0.0.1: no reply within 0.2 s (--timeout), asked 2 times" in line
    assert len(server.asked) == 2
    assert server.times[1] - server.times[0] < 10


def test_unreachable_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    line = fails(capsys, tmp_path / "mine.yaml", "--retries", "0")
    assert "127.0.0.1: cannot be reached, tried 1 times" in line and "refused" in line


def test_key_is_optional_with_a_url_of_ones_own(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    server.steps = [said(listing(TERMS))]
    assert EndpointChat("gpt-x").ask("", "")
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000")
    assert "OPENAI_BASE_URL: expected a URL" in fails(capsys, tmp_path / "mine.yaml")
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert "OPENAI_API_KEY: expected a key" in fails(capsys, tmp_path / "mine.yaml")


def test_file_is_overwritten_by_force_alone(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("precious")
    server.steps = [said(listing(TERMS))]
    with pytest.raises(SystemExit) as stop:
        run(path)
    assert stop.value.code == 2 and "--out: expected a new file, or --force" in capsys.readouterr().err
    assert path.read_text() == "precious" and not server.asked
    run(path, "--force")
    assert len(load_concept(path).terms) == 3


def test_file_that_appears_while_the_model_thinks_is_kept(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.yaml"
    server.steps = [said(listing(TERMS))]
    ask = EndpointChat.ask

    def ask_and_write(self: EndpointChat, system: str, request: str) -> str:
        path.write_text("precious")
        return ask(self, system, request)

    monkeypatch.setattr(EndpointChat, "ask", ask_and_write)
    with pytest.raises(SystemExit):
        run(path)
    assert path.read_text() == "precious" and server.asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--templates", "16"], "--templates: expected 1 to 15, got 16"),
        (["--templates", "0"], "--templates: expected 1 to 15, got 0"),
        (["--terms", "0"], "--terms: expected at least 1, got 0"),
        (["--attempts", "0"], "--attempts: expected at least 1, got 0"),
        (["--timeout", "0"], "--timeout, --retries: expected above 0 s"),
        (["--retries", "-1"], "--timeout, --retries: expected above 0 s"),
        (["--name", "../up"], "concept.name: expected letters"),
    ],
)
def test_options_out_of_range_are_refused(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in fails(capsys, tmp_path / "mine.yaml", *options)
    assert not server.asked
    with pytest.raises(ValueError, match="--also: expected wordings"):
        Wanted("knife crime", also=frozenset({"songs"}))


def test_package_openai_is_optional(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "trce-lightning[expand]" in fails(capsys, tmp_path / "mine.yaml")


def test_help_comes_without_torch() -> None:
    code = "import sys, trce_lightning.expand; sys.exit(bool({'torch', 'openai'} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


ODD = [
    "a clock at 10:30",
    "50% & more",
    "rock 'n' roll",
    '"quoted" words',
    "- dash",
    "#hash",
    "yes",
    "123",
    "1e5",
    "null",
]
ODD += [
    "~x",
    "=y",
    "a: b",
    "[x]",
    "{y}",
    "a $5 bill",
    "café",
    "枪",
    "🔫",
    "a\\b",
    "St. Peter",
    "?q",
    "!t",
    "*s",
    "&r",
    "%h",
]


def test_a_file_of_any_words_is_read_from_the_command_line(tmp_path: Path) -> None:
    concept = Concept(
        "枪-ü",
        dict.fromkeys(ODD, "a plain flower"),
        wordings={ODD[0]: tuple(f"the {word}" for word in ODD[1:])},
        related=tuple(f"my {word}" for word in ODD),
        unrelated=("a: {x}", "枪 & 花"),
        classes=("bow",),
        source="x: 'y' {z} #1",
    )
    file = tmp_path / "枪 (1), x=y.yaml"
    write_concept(file, concept)
    for config in (compose(str(file)), compose([str(file), "violence"]), compose(concept)):
        found = dataclasses.asdict(config.concept["枪-ü"])
        assert Concept.from_mapping(found, "options") == concept
        text = OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)
        assert Concept.from_mapping(yaml.safe_load(text)["concept"]["枪-ü"], "run") == concept
