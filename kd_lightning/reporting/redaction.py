"""Masks secrets in everything that is written or printed: access tokens, API keys, passwords in URLs."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from kd_lightning.console import printable

MASK = "***"
SHORTEST = 8
"""A shorter value of an environment variable is not searched for: it is more likely an ordinary word."""

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SECRET_NAME = re.compile(  # of the words of a name, joined by _
    r".*(password|passwd|passphrase|passcode|api_?key|api_?keys)|"
    r"(.*_)?(pwd|secrets?|credentials?|authorization|cookies?|bearer|"
    r"(access|account|auth|encryption|hub|license|private|secret|session|shared|signing|ssh|subscription)_?keys?|"
    r"(access|account|api|auth|bearer|client|git|github|gitlab|hf|hub|id|jwt|login|oauth|personal|refresh|sas|security|"
    r"service|session|tracking|wandb)_?tokens?)|auth|pass|token"
)
_OTHER_TOKEN = re.compile(r".*_token")
# `eos_token` and its like are no secrets, whatever their values are.
_ORDINARY_TOKEN = re.compile(
    r"(.*_)?(bos|eos|pad|unk|sep|cls|mask|image|video|audio|vision|start|end|stop|begin|special|prefix|suffix|middle|per|"
    r"next|last|first|new|max|min|num|by|boi|eoi|bot|eot|eom|eod|eop|blank|separator|system|assistant|tool|think)_token"
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_LIKE_A_KEY = re.compile(r"(?=.*\d)(?:(?:sk|hf|pk|key)_.*|[0-9a-f]{16,}|[A-Za-z0-9]{32,})")
_LIKE_A_SECRET = re.compile(r"(?=.*[A-Za-z])(?=.*\d)[\w.+/=-]{8,}", re.ASCII)
_WORD = r"[^\s'\"&;,()\[\]{}<>]++"
# The beginning of name: "value" as in JSON and Python, name: value, name=value, --name value
_NAME = re.compile(
    r"(?P<name>(?<![\w.-])[\w.-]{2,80}+)(?P<sign>\\?['\"]?\s{0,3}[:=]\s{0,3})|(?P<option>(?<!\S)--[\w.-]{2,80}+) "
)
_VALUE = re.compile(
    r"(?P<quote>['\"])(?:(?!(?P=quote))[^\\]|\\.)*+|(?P<escaped>\\['\"])(?:(?!(?P=escaped)).)*+|"
    rf"(?:bearer|basic|token)\s+{_WORD}|{_WORD}",
    re.IGNORECASE | re.DOTALL,
)
_ANYWHERE = [
    # user:password@ in a URL; the password may have a slash, a port may not be taken for one
    (re.compile(r"(://)[^\s/:@'\"]{0,200}:(?!\d{1,5}(?:/|$))[^\s'\"]{0,400}@"), rf"\1{MASK}@"),
    (re.compile(r"(://)[^\s/@'\"]{1,400}@"), rf"\1{MASK}@"),
    (re.compile(rf"(\b(?:bearer|basic)(?:[\s+]|%20)++)(?=[^\s'\"]{{6}}){_WORD}", re.IGNORECASE), rf"\1{MASK}"),
    # the forms of the tokens of well-known services
    (re.compile(r"\bhf_(?=[a-z0-9]{0,80}+[A-Z])[A-Za-z0-9]{8,}|\bsk-(?=[A-Za-z_-]{0,80}+\d)[\w-]{16,}"), MASK),
    (re.compile(r"\b(?:ghp_|gho_|github_pat_|glpat-|xox[bp]-|AKIA|AIza)[A-Za-z0-9_-]{12,}"), MASK),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"), MASK),
]
_IN_QUERY = re.compile(rf"([?&;])([\w.-]{{1,80}})=({_WORD})")
_QUERY_NAMES = re.compile(r"(.*_)?(key|token|sig|signature|auth|password|secret|code)")
_MASKED = re.compile(rf"//{re.escape(MASK)}@|[?&;][\w.-]+={re.escape(MASK)}")


def is_secret(name: object, value: object = "") -> bool:
    """Whether an argument holds a secret: `token`, `api_key`, `hub_token`, `password` …, but not `eos_token`.

    Args:
        name: of the argument, without the names of the groups around it.
        value: of the argument; it decides for a name such as `my_service_token`.
    """
    if not isinstance(name, str):
        return False
    words = re.sub(r"[-.\s]", "_", _CAMEL.sub("_", name.strip())).lower()
    if words.endswith("_key_env"):  # the name of a variable, or a key that was given by mistake
        return isinstance(value, str) and value != "" and not is_variable_name(value)
    if _SECRET_NAME.fullmatch(words):
        return True
    if not _OTHER_TOKEN.fullmatch(words) or _ORDINARY_TOKEN.fullmatch(words):
        return False
    return isinstance(value, str) and _LIKE_A_SECRET.fullmatch(value) is not None


def is_variable_name(text: str) -> bool:
    """Whether a text can be the name of an environment variable, and does not look like a key."""
    known = any(pattern.search(text) for pattern, _ in _ANYWHERE)
    return _VARIABLE.fullmatch(text) is not None and _LIKE_A_KEY.fullmatch(text) is None and not known


_VARIABLES: set[str] = set()  # environment variables that hold a secret, whatever their names are


def add_secret_variable(name: str) -> None:
    """Mask the value of this environment variable from now on, whatever the variable is called."""
    _VARIABLES.add(name)


def redact_value(text: str) -> str:
    """A text with secrets masked that need no name: in URLs, of the environment, tokens of well-known services."""
    for name in os.environ:
        secret = os.environ[name].strip()
        known = name in _VARIABLES or is_secret(name, secret)
        if len(secret) >= SHORTEST and known and not secret.startswith(("/", "~")):
            text = text.replace(secret, MASK)
    for pattern, masked in _ANYWHERE:
        text = pattern.sub(masked, text)
    return _IN_QUERY.sub(_redact_query, text)


def redact_text(text: str) -> str:
    """A message with secrets masked: as in `redact_value`, and values next to the name of a secret."""
    text, out, end = redact_value(text), [], 0
    for found in _NAME.finditer(text):
        value = None if found.start() < end else _VALUE.match(text, found.end())
        if value is not None and _is_named_secret(found, value):
            quote = value["quote"] or value["escaped"] or ""
            out += [text[end : found.end()], quote, MASK]
            end = value.end()
    return "".join([*out, text[end:]])


def _redact_query(found: re.Match[str]) -> str:
    before, name, value = found.groups()
    words = name.lower().replace("-", "_")
    return f"{before}{name}={MASK if _QUERY_NAMES.fullmatch(words) or is_secret(name, value) else value}"


def _is_named_secret(found: re.Match[str], value: re.Match[str]) -> bool:
    """Whether a value in a message, next to a name, is a secret."""
    text = value[0].lstrip("\\'\"")
    if text in ("", MASK, "None", "null", "True", "False", "true", "false"):
        return False
    name = (found["name"] or found["option"]).rpartition(".")[2].lstrip("-")
    if (
        found["sign"]
        and "=" not in found["sign"]
        and value[0][0] not in "\\'\""
        and name.lower() in ("token", "auth", "pass")
    ):
        return _LIKE_A_SECRET.fullmatch(text) is not None  # not in prose, such as "token: the first one"
    return is_secret(name, text)


def redact_config(value: Any, name: object = "") -> Any:
    """A configuration with the values of secret arguments masked, and secrets inside of other texts.

    Args:
        value: nested mappings, lists and plain values.
        name: of the argument that has this value.
    """
    if isinstance(value, Mapping):
        return {key: redact_config(inner, str(key).rpartition(".")[2]) for key, inner in value.items()}
    if isinstance(value, list):
        return [redact_config(inner, name) for inner in value]
    if isinstance(value, tuple):
        return tuple(redact_config(inner, name) for inner in value)
    if value is None or isinstance(value, bool) or value == "":
        return value
    if is_secret(name, value):
        return MASK
    return redact_value(value) if isinstance(value, str) else value


def redact_yaml(text: str, read: Callable[[str], Any]) -> str:
    """A configuration in YAML (or JSON) with its secrets masked; unchanged if it has none.

    Args:
        text: the configuration.
        read: the loader of configurations, which may read numbers otherwise than YAML's own.
    """
    import yaml

    try:
        config = read(text)
    except yaml.YAMLError:  # such as half of a character, which YAML writes and does not read
        return redact_text(text)
    redacted = redact_config(config)
    return text if redacted == config else str(yaml.safe_dump(redacted, sort_keys=False, allow_unicode=True))


def secret_names(value: object, prefix: str = "") -> Iterator[str]:
    """Dotted names of the arguments in a nested configuration that hold a secret: text or a number, not a switch."""
    for name, inner in _leaves(value, prefix):
        last = next((part for part in reversed(name.split(".")) if not part.isdigit()), "")
        if isinstance(inner, (str, int, float)) and not isinstance(inner, bool) and inner and is_secret(last, inner):
            yield name


def masked_names(value: object, prefix: str = "") -> Iterator[str]:
    """Dotted names of the arguments of a saved configuration whose values were masked."""
    for name, inner in _leaves(value, prefix):
        if isinstance(inner, str) and (inner == MASK or _MASKED.search(inner)):
            yield name


def _leaves(value: object, prefix: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, (Mapping, list, tuple)):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def print_message(text: str, file: TextIO | None = None) -> None:
    """Print a message without secrets and without characters that act on the terminal.

    Args:
        text: the message.
        file: None: stdout.
    """
    print(printable(redact_text(text)), file=file, flush=True)


def redact_messages() -> None:
    """Mask secrets in log messages, warnings and tracebacks of this process. Can be called again."""
    logging.setLogRecordFactory(_Redacted)
    if warnings.formatwarning is not _format_warning:
        _PLAIN.append(warnings.formatwarning)
        warnings.formatwarning = _format_warning
    sys.excepthook = _print_exception


class _Redacted(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(redact_text(super().getMessage()))


_PLAIN: list[Any] = []  # the function that formats warnings without masks


def _format_warning(*args: Any, **kwargs: Any) -> str:
    return printable(redact_text(str(_PLAIN[-1](*args, **kwargs))))


def _print_exception(*error: Any) -> None:
    print_message("".join(traceback.format_exception(*error)).rstrip("\n"), sys.stderr)
