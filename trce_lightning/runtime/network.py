"""Checks of the environment's network settings: proxies and the Hub's address.

The module imports nothing slow.
"""

from __future__ import annotations

import importlib.util
import os
from urllib.parse import urlsplit

from trce_lightning.errors import InputError

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_SOCKS = ("socks4", "socks5", "socks5h")
_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def check_proxies() -> None:
    """Raise ``InputError`` if a variable such as HTTPS_PROXY names no usable proxy."""
    for variable, url in os.environ.items():
        if url and variable.lower() in _PROXIES:
            _check_url(variable, url if "://" in url else f"http://{url}", ("http", "https", *_SOCKS))
            if url.startswith(_SOCKS) and importlib.util.find_spec("socksio") is None:
                raise InputError(f"{variable}: expected a proxy of HTTP, or the package socksio, got {url!r}")


def check_hub() -> None:
    """Raise ``InputError`` if the environment's address of the Hub, or a proxy, can't be used."""
    if endpoint := os.environ.get("HF_ENDPOINT"):
        _check_url("HF_ENDPOINT", endpoint, ("http", "https"))
    check_proxies()


def spare_this_machine() -> None:
    """Exclude this machine's own addresses from proxies."""
    for variable in ("no_proxy", "NO_PROXY"):  # programs read one or the other
        listed = [host.strip() for host in os.environ.get(variable, "").split(",") if host.strip()]
        if "*" not in listed:
            os.environ[variable] = ",".join([*listed, *(h for h in _THIS_MACHINE if h not in listed)])


def _check_url(variable: str, url: str, schemes: tuple[str, ...]) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in schemes and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # an address without its second bracket, or a port that is no number
        usable = False
    if not usable:
        expected = ", ".join(f"{scheme}://" for scheme in schemes)
        raise InputError(f"{variable}: expected a URL of {expected}, got {url!r}")
