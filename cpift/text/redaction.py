"""Secrets in text: what counts as one, and text without them. What is shown or written passes here.

A secret is a password or a key in an address of any spelling, a token in a form that its issuer made known, or a
private key. What is encoded is looked at decoded. Repetitions are bounded: text of others must not make a search slow.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from cpift.text.escaping import terminal, text_of

HIDDEN = "***"
_SCHEME, _BEFORE = r"[a-z][a-z0-9+.-]{0,30}:", r"(?<![^\s\"'=(])"
_END = r"\s\"'<>`"
_PORT = r"(?!\d+(?:[\\/?#]|$))"
_ADDRESSES = (
    # scheme://TOKEN@host, scheme://name:password@host, //name:password@host
    re.compile(rf"(?P<kept>{_SCHEME}[\\/]{{2}}|{_BEFORE}[\\/]{{2}})[^\\/?#{_END}]{{1,512}}@", re.IGNORECASE),
    # a password with slashes in it, any number of slashes before it
    re.compile(
        rf"(?P<kept>{_SCHEME}[\\/]{{1,4}}|{_BEFORE}[\\/]{{2,4}})[^\\/@:{_END}]{{0,256}}:{_PORT}[^\s]{{0,512}}@",
        re.IGNORECASE,
    ),
)
# In a field that is no prose: a password with spaces in it.
_SPACED = re.compile(rf"{_SCHEME}[\\/]{{1,4}}[^\\/?#@:\s]{{0,256}}:{_PORT}[^@]{{0,512}}@", re.IGNORECASE)
_WORDS = "keys?|token|secret|passw(?:or)?d|passphrase|pass|pwd|pw|auth|authorization|credentials?|sig|signature|sas|jwt"
_NAMED = rf"(?:[a-z0-9]{{1,40}}[-_.]){{0,4}}(?:{_WORDS}|[a-z]{{1,20}}(?:key|token|secret|password))(?:[-_.]?id)?"
_QUERY = re.compile(rf"(?P<kept>[?&;#](?:\w{{0,40}}\[)?{_NAMED}\]?=)[^&;#{_END}]{{1,2048}}", re.IGNORECASE)
_TOKENS = re.compile(
    r"\b[sr]k-(?=[\w-]{0,256}?[A-Za-z0-9]{16})(?=[\w-]{0,256}\d)[\w-]{16,256}|\b[rsp]k_(?:live|test)_\w{10,256}|\bhf_[A-Za-z0-9]{20,128}"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,256}|\bgithub_pat_\w{20,256}|\bglpat-[\w-]{16,128}|\bxox[a-z]-[\w-]{10,256}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,64}|\beyJ[\w-]{10,2048}\.[\w-]{4,4096}\.[\w-]{0,2048}"
    r"|\b(?:gsk_|xai-|nvapi-|r8_|whsec_|dop_v1_|shpat_|hvs\.|ATATT3x|pypi-|dckr_pat_|AGE-SECRET-KEY-1|ya29\.|GOCSPX-"
    r"|wandb_v1_|tgp_v1_|pplx-|csk-|gl[a-z]{2,6}-|SG\.)(?=[\w.-]{0,256}\d)[A-Za-z0-9]{16}[\w.-]{0,256}"
    r"|\bxapp-[\w-]{10,256}|\bhooks\.slack\.com/services/[\w/]{20,128}|\bbot\d{6,12}:[\w-]{30,64}"
    r"|\b(?i:basic)\s{1,4}(?=[A-Za-z0-9+/]{0,256}[a-z])(?=[A-Za-z0-9+/]{0,256}[A-Z])(?=[A-Za-z0-9+/]{0,256}\d)"
    r"[A-Za-z0-9+/]{12,512}={0,2}"
    r"|\bnpm_[A-Za-z0-9]{30,64}|\b(?i:bearer\s{1,4}(?=[\w.~+/=-]{0,256}\d)[\w.~+/=-]{8,2048})"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[^-]{0,20000}(?:-----END [A-Z ]{0,40}-----)?"
)
# A name that says what it is, with its value; no prose.
_PAIR = re.compile(
    r"(?P<kept>(?<![a-z0-9])(?:password|passwd|pwd|(?:api|access|account|secret|private)[-_]?key"
    r"|(?:auth|access|api|secret)[-_]?token|client[-_]?secret)[\"']?\s{0,2}[:=]\s{0,2}[\"']?)(?!\*)[^\s\"'{}]{1,2048}",
    re.IGNORECASE,
)
# In logs and messages alone: a variable with its value, a header.
_ASSIGNED = re.compile(
    r"(?P<kept>\b[A-Z0-9_]{0,60}(?:KEY|TOKEN|SECRET|PASSWORD)\s{0,2}=\s{0,2}[\"']?)[^\s\"']{1,2048}"
    r"|(?P<header>\b[Aa]uthorization[\"']?\s{0,2}[:=]\s{0,2}[\"']?)(?:[A-Za-z]{1,20} )?[^\s\"']{1,2048}"
)
# name:password@host without a scheme: in fields of a config that are no prose of the user's own.
_LOGIN = re.compile(r"(?<![\w/@])[\w.+-]{1,64}:(?!\d+[\\/])[^\s\\/:@]{1,128}@(?=[\w.-])")
_NO_PROSE = (_LOGIN, _SPACED, _PAIR)
_PROSE = re.compile(r"(.*\.)?(instruction|columns\..*|chat_template)", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u00|x)([0-9a-fA-F]{2})")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")


def redacted(text: str) -> str:
    """The text with every secret in it replaced by ***."""
    for pattern in _ADDRESSES:
        text = pattern.sub(lambda match: f"{match['kept']}{HIDDEN}@", text)
    for pattern in (_QUERY, _PAIR):
        text = pattern.sub(lambda match: f"{match['kept']}{HIDDEN}", text)
    text = _ASSIGNED.sub(lambda match: f"{match['kept'] or match['header']}{HIDDEN}", _TOKENS.sub(HIDDEN, text))
    return re.sub(rf"[^{_END}]+", lambda run: HIDDEN if _veiled(run[0]) else run[0], text)


def redacted_values(raw: Any) -> Any:
    """A nested structure with every text in it redacted, names too."""
    if isinstance(raw, Mapping):
        return {redacted(key) if isinstance(key, str) else key: redacted_values(value) for key, value in raw.items()}
    if isinstance(raw, (list, tuple)):
        return [redacted_values(value) for value in raw]
    return redacted(raw) if isinstance(raw, str) else raw


def secret_fields(raw: Any, where: str = "") -> Iterator[str]:
    """The dotted names of what holds a secret in a nested structure, names among them."""
    items = raw.items() if isinstance(raw, Mapping) else enumerate(raw) if isinstance(raw, (list, tuple)) else ()
    for key, value in items:
        here = f"{where}.{key}" if where else str(key)
        if isinstance(key, str) and holds_secret(key, prose=True):
            yield f"{where or 'the file'} (the name of a field)"
        elif isinstance(value, str):
            if holds_secret(value, prose=is_prose(here)):
                yield here
        else:
            yield from secret_fields(value, here)


def is_prose(field: str) -> bool:
    """Whether a field of a config, by its dotted name, holds text of the user's own making."""
    return _PROSE.fullmatch(field) is not None


def is_template(value: str) -> bool:
    """Whether a text is a chat template itself, in jinja, and not the name of one."""
    return "{%" in value or "{{" in value


def holds_secret(text: str, prose: bool = False) -> bool:
    """Whether a secret is in a text; where it is no prose, `name:password@host` alone is one too."""
    forms = (text, _unveiled(text))
    return any(_bare(form) or (not prose and any(pattern.search(form) for pattern in _NO_PROSE)) for form in forms)


def is_variable(name: str) -> bool:
    """Whether a text is an environment variable's name, and not what belongs into one."""
    return (
        _VARIABLE.fullmatch(name) is not None and not _bare(name) and not re.search(r"(?=[A-Z]*\d)[A-Z0-9]{20}", name)
    )


def is_secret_variable(name: str, value: str) -> bool:
    """Whether an environment variable is for those alone who need it."""
    return re.fullmatch(rf"(?:.*_)?(?:{_NAMED})(?:_.*)?", name, re.IGNORECASE) is not None or holds_secret(value)


class RedactingFormatter(logging.Formatter):
    """Log lines, tracebacks included, without secrets and escape sequences."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(terminal(super().format(record)))


def _bare(text: str) -> bool:
    return any(pattern.search(text) for pattern in (*_ADDRESSES, _QUERY, _TOKENS))


def _veiled(run: str) -> bool:
    """Whether text without spaces holds a secret once it is decoded."""
    if not any(sign in run for sign in ("%", "&", "\\")) and run.isascii():
        return False
    plain = _unveiled(run)
    return plain != run and _bare(plain.replace(HIDDEN, ""))


def _unveiled(text: str) -> str:
    """Decoded from percents, entities and backslashes, several times where need be, and in the letters that others
    stand for (fullwidth ones)."""
    for _ in range(16):
        further = text_of(unquote(_ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)))
        if further == text:
            break
        text = further
    return text if text.isascii() else unicodedata.normalize("NFKC", text)
