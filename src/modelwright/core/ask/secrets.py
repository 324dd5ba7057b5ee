"""The one place that keeps an API key out of what is stored and shown.

A key comes from an environment variable, which the settings name. A key that stands where a name or an address belongs is
refused without being repeated, because settings are written into the result. Whatever an endpoint says passes `Secrets.mask`
before it becomes an answer, a count or a sentence.
"""

import os
import re
from typing import Any
from urllib.parse import quote, urlsplit

from modelwright.core.errors import UserError

_SHORTEST = 8  # characters: a shorter key (vLLM's "EMPTY") guards nothing, and masking it would change answers
_NAME = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|[A-Z][A-Z0-9]{0,11}")
_SECRET_FIELD = re.compile(r"(^|[_-])(api[_-]?key|key|secret|password|authorization|auth|bearer|access[_-]?token)$", re.I)
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Secrets:
    """Masks a key wherever it stands in a text: whole, as in an address, or cut off at the end."""

    def __init__(self, key: str):
        self._key = key if len(key) >= _SHORTEST else ""

    def mask(self, text: str) -> str:
        if not self._key:
            return text
        for form in (self._key, quote(self._key, safe="")):
            text = text.replace(form, "***")
        for n in range(min(len(self._key), len(text)), _SHORTEST - 1, -1):
            if text.endswith(self._key[:n]):
                return text[:-n] + "***"
        return text


def read_key(name: str, host: str) -> str:
    """The key in the environment variable `name`; empty where none is needed.

    Raises UserError for a variable that is not set, unless the host is this machine, for a name that looks like a key itself, and
    for a key that no HTTP header can carry. No sentence repeats a key.
    """
    if not name:
        return ""
    if name not in os.environ and not _NAME.fullmatch(name):
        raise UserError(
            "endpoint.key names no environment variable",
            "what stands there looks like a key, and would be written down with the settings",
            "put the key into a variable such as OPENAI_API_KEY and give its name",
        )
    key = os.environ.get(name, "")
    if not key and host not in _LOCAL:
        raise UserError(f"the environment variable {name} is not set", f"{host} needs a key", "set it, or name another: endpoint.key")
    if key != key.strip() or any(c.isspace() for c in key):
        raise UserError(f"the key in {name} holds a space or a line break", "no header can carry it", f"set {name} again without it")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the key in {name} holds a character that is not plain ASCII", "no header can carry it", f"set {name} again")
    return key


def check_address(url: str) -> str:
    """The host of an address. Raises UserError for what is no address, or more than one; the sentence repeats neither."""
    how = "write it as in https://api.openai.com/v1"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        if parts.username or parts.password or parts.query or parts.fragment or ";" in parts.path:
            raise UserError("url holds more than an address", "a key in it would be written down", "give the key by endpoint.key")
        if parts.scheme not in ("http", "https") or not host or any(c.isspace() or not c.isprintable() for c in url):
            raise UserError(f"url={_shown(url)} is no address", how=how)
        host.encode("idna")
    except ValueError:  # what it says repeats the address
        raise UserError("url is no address", "its host or its port cannot be read", how) from None
    return host


def _shown(url: str) -> str:
    """An address that is wrong, as far as it can hold no secret."""
    return url if re.fullmatch(r"[a-z]{0,10}:?/{0,2}[\w.-]{0,30}", url) else "..."


def check_settings(body: dict[str, Any], url: str, model: str, key: str) -> None:
    """Raises UserError for a secret among the settings that are written down."""
    for field in body:
        if _SECRET_FIELD.search(str(field)):
            raise UserError(f"endpoint.body.{field} looks like a secret", "settings are written down", "give the key by endpoint.key")
    if len(key) >= _SHORTEST and any(key in text for text in (url, model, str(body))):
        raise UserError("the key stands in the settings", "they are written down", "give it by endpoint.key alone")
