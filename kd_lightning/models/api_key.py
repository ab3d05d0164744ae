"""The key of a server: it stands in an environment variable, is sent, and is masked wherever it comes back."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from urllib.parse import quote

from kd_lightning.reporting.redaction import MASK, SHORTEST, add_secret_variable, is_variable_name, redact_text

DEFAULT_VARIABLE = "OPENAI_API_KEY"

_CERTAINLY_A_NAME = re.compile(r"[A-Z][A-Z_]*")  # a key has lower case letters or digits


@dataclass(frozen=True)
class ApiKey:
    """The key in an environment variable. Only the variable's name is kept: the key is read when it is sent.

    Args:
        variable: name of the variable. `OPENAI_API_KEY` may be unset, and then no key is sent; any other must be set.

    Raises:
        ValueError: `variable` is not a name, or looks like a key; the variable is not set, or holds a key that cannot
            be sent in a header. No message contains the key.
    """

    variable: str = DEFAULT_VARIABLE

    def __post_init__(self) -> None:
        name = self.variable
        if not isinstance(name, str) or not is_variable_name(name):
            raise ValueError(
                f"api_key_env must be the name of an environment variable that holds the key, such as "
                f"{DEFAULT_VARIABLE}, and the given text is none (it is not shown, as it may be a key): set a variable "
                "to the key, and pass its name"
            )
        add_secret_variable(name)
        if not self.read() and name != DEFAULT_VARIABLE:
            raise ValueError(
                f"api_key_env names an environment variable that is not set{self._shown()}: set it to the server's "
                "key, or leave api_key_env out if the server needs none"
            )

    def read(self) -> str:
        """The key; empty if there is none.

        Raises:
            ValueError: it cannot be sent in a header.
        """
        key = os.environ.get(self.variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"the environment variable of api_key_env{self._shown()} must be one line of ASCII characters"
            )
        return key

    def _shown(self) -> str:
        """The name of the variable for a message, unless it may be a key that was given instead of a name."""
        return f" ({self.variable})" if _CERTAINLY_A_NAME.fullmatch(self.variable) else ""

    def mask(self, content: bytes, shortest: int = SHORTEST) -> bytes:
        """An answer of a server that may echo the headers of its request, without the key in them.

        Args:
            content: the answer.
            shortest: a shorter key stays: it is more likely an ordinary word.
        """
        key = self.read()
        if len(key) < shortest:
            return content
        forms = {key, json.dumps(key)[1:-1], key.replace("/", r"\/"), quote(key, safe=""), quote(key)}
        for form in sorted(forms, key=len, reverse=True):
            content = content.replace(form.encode(), MASK.encode())
        return content

    def one_line(self, text: str) -> str:
        """A text of a server as one line, without secrets."""
        return redact_text(" ".join(self.mask(text.encode("utf-8", "replace"), 4).decode().split()))

    def shortened(self, content: bytes) -> str:
        """The beginning of an answer as one line, without secrets."""
        text = self.one_line(self.mask(content, 4)[:4096].decode("utf-8", "replace"))
        return text if len(text) <= 200 else text[:199] + "…"
