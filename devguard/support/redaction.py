"""Redaction: command lines and settings without the secrets that they hold, for logs and other records.

A value is redacted if its name says that it is secret (``--api-key=...``, ``HF_TOKEN=...``, ``"password": "..."``), if
it follows ``Bearer``, if it is the user part of a URL, or if it has the form of a well-known token. A secret without
any such sign cannot be told from other text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["redact", "redact_command", "redact_setting"]

MARK = "***"

# A name is secret if its last word is here, if it ends like these, or if one of these is in it.
LAST_WORDS = {
    "auth", "authorization", "bearer", "cookie", "cookies", "credential", "credentials", "dsn", "key", "keys", "pass",
    "passphrase", "passwd", "psk", "pw", "pwd", "userpwd",
}  # fmt: skip
ENDS = ("apikey", "apikeys", "accesskey", "privatekey", "keyid", "passwd", "token")
PARTS = ("password", "passphrase", "secret", "credential", "apikey", "accesstoken", "authtoken", "apitoken")

SCHEMES = ("bearer", "basic", "digest", "negotiate", "token")  # words before the secret itself
# A name, what may close it in code and JSON, and what precedes the value.
ASSIGNMENT = re.compile(r"""(?<![\w.-])([\w.-]+)(["'\])]*[ \t]*[=:][ \t]*(?:[bruf]{0,2}["'])?)""", re.IGNORECASE)
UNQUOTED = re.compile(rf"""(?:(?:{"|".join(SCHEMES)})\s+)?[^\s"'&]*""", re.IGNORECASE)
OPTION = re.compile(r"(?:--?|/)([\w.-]+)")
SHAPES = (
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31}://)[^\s/?#\"']*@"), rf"\g<1>{MARK}@"),
    (re.compile(r"\b((?:bearer|basic|digest|negotiate)(?:\s+|%20|\+))[\w.~+/=:-]{6,}", re.IGNORECASE), rf"\g<1>{MARK}"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END|\Z)", re.DOTALL), MARK),
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[a-z]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
            r"|xox[a-z]-[\w-]{10,}|A[KS]IA[A-Z0-9]{12,}|AIza[\w-]{30,}|nvapi-[\w-]{16,}"
            r"|eyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]+)?)"
        ),
        MARK,
    ),
)
LONGEST = 16_384  # characters of a command line that are kept


def redact_command(words: Sequence[str]) -> str:
    """Return a command line as one line of text, without its secrets, and cut where it is very long.

    Parameters
    ----------
    words : sequence of str
        The program and its arguments.
    """
    shown: list[str] = []
    follows = False  # whether the word before was an option with a secret name, and without its value
    left = LONGEST
    for word in (str(word)[:LONGEST] for word in words):
        left -= len(word) + 1
        if left < 0:
            shown.append("...")
            break
        if follows and not word.startswith("--"):
            follows = word.lower() in SCHEMES
            shown.append(word if follows else MARK)
            continue
        name, equals, value = word.partition("=")
        is_whole = equals and value.lower() not in SCHEMES and re.fullmatch(r"[-+/\w.]+", name) and _is_secret(name)
        shown.append(f"{name}={MARK}" if is_whole else word)
        option = OPTION.fullmatch(word)
        follows = option is not None and _is_secret(option[1])
    return redact(" ".join(shown))


def redact_setting(name: str, value: str) -> str:
    """Return the value of a variable without its secrets."""
    return MARK if _is_secret(name) else redact(value)


def redact(text: str) -> str:
    """Return `text` with each secret in it replaced by ``***``."""
    kept = []
    start = 0
    while found := ASSIGNMENT.search(text, start):
        kept.append(text[start : found.end()])
        start = found.end()
        if _is_secret(found[1]):
            end = _end_of_value(text, start)
            kept.append(MARK if end > start else "")
            start = end
    result = "".join([*kept, text[start:]])
    for shape, replacement in SHAPES:
        result = shape.sub(replacement, result)
    return result


def _end_of_value(text: str, start: int) -> int:
    """Return where the value ends that starts at `start`: at its quotation mark, or at the next space."""
    if text[start - 1] in "\"'":
        end = text.find(text[start - 1], start)
        return len(text) if end < 0 else end
    found = UNQUOTED.match(text, start)
    return start if found is None else found.end()


def _is_secret(name: str) -> bool:
    """Return whether the name of an option or a variable says that its value is secret."""
    words = re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower().rstrip("0123456789_-."))
    glued = "".join(words)
    return words[-1] in LAST_WORDS or glued.endswith(ENDS) or any(part in glued for part in PARTS)
