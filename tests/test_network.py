"""A proxy that stands in the way: of this machine's own addresses, and one that is none."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.request import urlopen

import pytest

from trce_lightning.concepts.chat import EndpointChat
from trce_lightning.errors import InputError
from trce_lightning.prompts.hub import dataset_file
from trce_lightning.runtime.network import check_hub, check_proxies, spare_this_machine

DEAD = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    for name in [*os.environ]:
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy", "hf_endpoint"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[str]:
    """Answers every request with a chat completion."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"message": {"role": "assistant", "content": "here"}}]}')

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_an_endpoint_of_this_machine_is_asked_without_a_proxy(
    server: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    monkeypatch.setenv(variable, DEAD)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server}/v1")
    assert EndpointChat("any", timeout=5.0, retries=0).ask("a", "b") == "here"


def test_what_is_excepted_already_stays_so(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", DEAD)
    with pytest.raises(OSError, match="refused"):
        urlopen(server, timeout=5)
    monkeypatch.setenv("NO_PROXY", "example.org, localhost")
    spare_this_machine()
    assert os.environ["NO_PROXY"] == "example.org,localhost,127.0.0.1,::1"
    assert urlopen(server, timeout=5).status == 200
    monkeypatch.setenv("NO_PROXY", "*")
    spare_this_machine()
    assert os.environ["NO_PROXY"] == "*"


@pytest.mark.parametrize("url", ["foo://bar", "http://", "http://[", "http://host:port", "http://host:99999"])
def test_a_proxy_that_is_none_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a library reads it, whichever it is."""
    monkeypatch.setenv("HTTPS_PROXY", url)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    for ask in (check_proxies, lambda: dataset_file("owner/sets", "a.csv"), lambda: EndpointChat("any")):
        with pytest.raises(InputError, match="HTTPS_PROXY: expected a URL of http://"):
            ask()


@pytest.mark.parametrize("url", ["", DEAD, "host:3128", "https://user:secret@host:3128/"])
def test_a_proxy_is_taken(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", url)
    check_hub()


@pytest.mark.parametrize("url", ["bogus", "ftp://host", "http://"])
def test_an_address_of_the_hub_that_is_none_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    with pytest.raises(InputError, match="HF_ENDPOINT: expected a URL"):
        dataset_file("owner/sets", "a.csv")
