"""A language model behind an OpenAI-compatible endpoint. It answers one request with text.

The module imports openai only where it uses it, so that help and refusals appear at once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trce_lightning.concepts.draft import Reply
from trce_lightning.errors import InputError
from trce_lightning.runtime.network import check_proxies, spare_this_machine

if TYPE_CHECKING:
    from openai import APIError, OpenAI

__all__ = ["EndpointChat"]

log = logging.getLogger(__name__)
_SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "concept", "schema": Reply.model_json_schema()},
}


class EndpointChat:
    """A model behind an endpoint that speaks OpenAI's chat-completions protocol.

    OPENAI_BASE_URL is the endpoint's URL. If it is unset, the endpoint is OpenAI's own, which needs
    OPENAI_API_KEY. After rate limits, time-outs and server errors, the class waits and asks again. It sends
    the reply's JSON schema, which most servers (vLLM, llama.cpp, Ollama, OpenAI) enforce. If the server
    refuses the schema, it asks without one.

    Args:
        model: the endpoint's name for the model.
        timeout: seconds to wait for one reply.
        retries: how often to ask again if no reply comes.

    Raises:
        InputError: the package openai, a key or a usable URL is missing. ``ask`` raises it if the server
            refuses the request.
        OSError: ``ask`` raises it if no reply came after all retries.
    """

    def __init__(self, model: str, timeout: float = 120.0, retries: int = 4) -> None:
        if timeout <= 0 or retries < 0:
            raise InputError(
                f"--timeout, --retries: expected above 0 s and 0 or more, got {timeout:g}, {retries}"
            )
        self._model, self._timeout, self._tries = model, timeout, retries + 1
        self._client = _client(timeout, retries)
        self._host = self._client.base_url.host
        self._options: dict[str, Any] = {"response_format": _SCHEMA}
        self.source = f"{model} at {self._host}"
        """The name of the model and its host."""

    def ask(self, system: str, request: str) -> str:
        """Return the text of the reply to ``request``, with ``system`` as the system message."""
        import openai

        messages = _messages(system, request)
        try:
            return self._reply(messages)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if not self._options:
                raise self._failure(error) from error
            self._options = {}
            log.info("%s refused the request; asking without a JSON schema", self._host)
            return self.ask(system, request)
        except openai.APIError as error:
            raise self._failure(error) from error

    def _reply(self, messages: Any) -> str:
        create = self._client.chat.completions.create
        try:
            completion = create(model=self._model, messages=messages, **self._options)
        except json.JSONDecodeError as error:  # the package doesn't check replies
            raise self._no_endpoint(error.doc) from error
        choices = getattr(completion, "choices", None)
        message = getattr(choices[0], "message", None) if choices else None
        if message is None:
            raise self._no_endpoint(str(completion))
        return message.content or getattr(message, "refusal", None) or ""

    def _no_endpoint(self, reply: str) -> InputError:
        return InputError(
            f"OPENAI_BASE_URL: expected the URL of a chat-completions endpoint, which often ends in /v1, got "
            f"{str(self._client.base_url)!r}, which answers {_shortened(reply)!r}"
        )

    def _failure(self, error: APIError) -> Exception:
        """Return the error that tells a user what to change."""
        import openai

        if isinstance(error, openai.APITimeoutError):
            return TimeoutError(
                f"{self._host}: no reply within {self._timeout:g} s (--timeout), asked {self._tries} times"
            )
        if isinstance(error, openai.RateLimitError):
            wait = error.response.headers.get("retry-after", "unstated")
            return ConnectionError(
                f"{self._host}: too many requests (429, Retry-After {wait}), {self._tries} tries at most: "
                f"{_said(error)}"
            )
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return InputError(f"OPENAI_API_KEY: expected a key for {self._host}, got: {_said(error)}")
        if isinstance(error, openai.NotFoundError):
            return InputError(
                f"--model, OPENAI_BASE_URL: expected a model of that endpoint, got {self._model!r} at "
                f"{str(self._client.base_url)!r}: {_said(error)}"
            )
        if isinstance(error, openai.APIConnectionError):
            return ConnectionError(
                f"{self._host}: cannot be reached, tried {self._tries} times: {error.__cause__ or error}"
            )
        if isinstance(error, openai.BadRequestError):
            return InputError(f"{self._host}: refuses the request: {_said(error)}")
        return ConnectionError(f"{self._host}: answers no request: {_said(error)}")


def _client(timeout: float, retries: int) -> OpenAI:
    try:
        from openai import OpenAI
    except ImportError as error:
        raise InputError(
            "--model: expected the package openai; install it with: pip install 'trce-lightning[expand]'"
        ) from error
    url, key = os.environ.get("OPENAI_BASE_URL"), os.environ.get("OPENAI_API_KEY")
    if url and not url.startswith(("http://", "https://")):
        raise InputError(f"OPENAI_BASE_URL: expected a URL that begins with http:// or https://, got {url!r}")
    if not url and not key:
        raise InputError(
            "OPENAI_API_KEY: expected a key, or OPENAI_BASE_URL with a server's URL, got neither"
        )
    check_proxies()
    spare_this_machine()
    return OpenAI(base_url=url or None, api_key=key or "none", timeout=timeout, max_retries=retries)


def _messages(system: str, request: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": request}]


def _said(error: APIError) -> str:
    body = error.body
    return _shortened(str(body["message"] if isinstance(body, Mapping) and "message" in body else error))


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:199]}…"
