"""Redaction: command lines and settings without the secrets that they hold, for logs and other records.

A value is redacted if its name says that it is secret (``--api-key ...``, ``HF_TOKEN=...``, ``"password": "..."``,
``setdefault("TOKEN", "...")``), if it follows ``Bearer``, if it is the user part of a URL, or if it has the form of a
well-known token. In doubt more is redacted: the word after ``--token`` is its value even if it looks like an option. A
secret without any such sign cannot be told from other text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["redact", "redact_command", "redact_setting"]

MARK = "***"

# A name is secret if its last word is here, if it ends like these, or if one of these is in it.
LAST_WORDS = {
    "auth", "authorization", "bearer", "cookie", "cookies", "credential", "credentials", "dsn", "jwt", "jwts", "key",
    "keys", "otp", "pass", "passphrase", "passwd", "pat", "pats", "pin", "psk", "pw", "pwd", "sas", "sessionid", "sid",
    "sig", "signature", "userpwd",
}  # fmt: skip
ENDS = ("apikey", "apikeys", "accesskey", "privatekey", "keyid", "passwd", "token")
PARTS = ("password", "passphrase", "secret", "credential", "apikey", "accesstoken", "authtoken", "apitoken")
OF_TOKENS = {"api", "auth", "access", "bot", "hf", "id", "refresh", "session", "user"}  # not max_tokens, num_tokens
VALUE_WORDS = {"value", "val", "str", "string", "text", "plain", "raw", "hex", "b64", "base64"}  # token_value

SCHEMES = ("bearer", "basic", "digest", "negotiate", "token", "apikey")  # words before the secret itself
OPERATOR = r"(?::=|=>|={1,3}|:)"
# A name, what may close it in code and JSON, and what precedes the value; or a quoted name before the next argument.
ASSIGNMENT = re.compile(
    rf"""(?<![\w.%-])([\w.%-]+)(?:[\\"'\])]{{0,8}}\s{{0,64}}{OPERATOR}|\\*["']\s{{0,64}},)\s{{0,64}}(?:![\w!]+\s+)?"""
)
WHOLE = re.compile(rf"(?:--?|[+/])?([\w.%-]+(?:[/+][\w.%-]+)*)[ \t]*{OPERATOR}")  # a word that is one assignment
OPTION = re.compile(rf"(?:--?|/)?([\w.%-]+){OPERATOR}?|.*[=\s]([\w.-]+)[:=]", re.DOTALL)
SPACE = r"(?:[ \t]|\\\n)+"  # between words of a shell command
IN_TEXT = re.compile(
    rf"""(?<![\w.-])(?:--?([A-Za-z][\w.-]*){SPACE}|[A-Za-z]\w*[_.-][\w.-]*{SPACE}(?![=:]|--?(?:\s|$)))"""
)
NEXT_WORD, NEXT_VALUE = re.compile(SPACE), re.compile(rf"{SPACE}(?![-;|&<>])")
HEADER = re.compile(r"(?:cookies?|authorization)[ \t]*:", re.IGNORECASE)  # Its value has many parts.
USER_OPTION = re.compile(r"(?:-u|--?(?:proxy-)?user|--login|--auth)")
USER_IN_TEXT = re.compile(r"""((?<![\w-])(?:-[uU]\s*|--(?:proxy-)?user[ =]\s*))[^\s"':]+:[^\s"']+""")
OPENING = re.compile(r"""[bruf]{0,2}(\\*)(["'])""", re.IGNORECASE)
UNQUOTED = re.compile(r"""[^\s"'&()\[\]{}]+""")
BRACKETS = {"(": ")", "[": "]", "{": "}"}
USER_PART = re.compile(
    r"""([A-Za-z][A-Za-z0-9+.-]{0,31}:(?:\\?/){2})(?:[^\s/?#"'@:]{0,512}:[^\s"']{0,512}|[^\s/?#"']{0,1024})@"""
)
SHAPES = (
    (re.compile(r"\b((?:bearer|basic|digest|negotiate)(?:\s+|%20|\+))[\w.~+/=:-]{6,}", re.IGNORECASE), rf"\g<1>{MARK}"),
    (re.compile(r"\b(sshpass\s+-p)\s*\S+"), rf"\g<1> {MARK}"),
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
    names, follows = False, False  # whether the word before was a secret name; whether values of one may still follow
    left = LONGEST
    before = ""
    for word in (str(word)[:LONGEST] for word in words):
        left -= len(word) + 1
        if left < 0:
            shown.append("...")
            break
        is_value = names or (follows and not word.startswith("-"))
        if word in ("=", ":", ":=", "=>", "==") and _is_secret(before):
            is_value, names, follows = False, True, True
        elif is_value:
            names, follows = _is_no_value_yet(word), True
        else:
            names = follows = _names_secret(word)
        if USER_OPTION.fullmatch(before) and ":" in word:
            is_value = True
        shown.append(MARK if is_value else redact(word))
        before = word
    return _redact_shapes(" ".join(shown))


def redact_setting(name: str, value: str) -> str:
    """Return the value of a variable without its secrets."""
    return MARK if _is_secret(name) else redact(value)


def redact(text: str) -> str:
    """Return `text` with each secret in it replaced by ``***``."""
    text = USER_IN_TEXT.sub(rf"\g<1>{MARK}", USER_PART.sub(rf"\g<1>{MARK}@", text))
    whole = WHOLE.match(text)
    if whole and _is_secret(whole[1]):
        value = text[whole.end() :]
        is_scheme = value.strip().lower() in SCHEMES or not value
        return text if is_scheme else text[: whole.end()] + (" " if value[0] == " " else "") + MARK
    return _redact_shapes(_redact_named(_redact_named(text, IN_TEXT), ASSIGNMENT))


def _redact_named(text: str, pattern: re.Pattern[str]) -> str:
    """Return `text` without the values of the secret names that `pattern` finds."""
    kept = []
    start = 0
    while found := pattern.search(text, start):
        kept.append(text[start : found.end()])
        start = found.end()
        if _is_secret(found[1] or found[0].strip()):
            is_header = HEADER.search(found[0]) is not None
            is_list = is_header if pattern is ASSIGNMENT else found[1] is not None
            end = _end_of_value(text, start, found.start())
            end = max(end, _end_of_values(text, start)) if is_list else end
            kept.append(MARK if end > start else "")
            start = end
    return "".join([*kept, text[start:]])


def _redact_shapes(text: str) -> str:
    for shape, replacement in SHAPES:
        text = shape.sub(replacement, text)
    return text


def _end_of_values(text: str, start: int) -> int:
    """Return where the values of an option end: before the next option, the end of the command or a closing quote."""
    end = _end_of_piece(text, start)
    before = start
    while (space := (NEXT_WORD if _is_no_value_yet(text[before:end]) else NEXT_VALUE).match(text, end)) is not None:
        before, following = space.end(), _end_of_piece(text, space.end())
        if following == before:
            break
        end = following
    return end


def _end_of_value(text: str, start: int, name: int) -> int:
    """Return where the value ends that starts at `start`, after the name that starts at `name`.

    A quote right before the name ends the value too, as in ``"Cookie: a=b; c=d"``.
    """
    end = start
    around = text[name - 1 : name]
    if around in ("'", '"') and text[start : start + 1] not in ("'", '"', "\\", "[", "{", ""):
        closing = text.find(around, start)
        operator = text[name:start]
        if closing >= 0 and around not in operator:
            return closing
    scheme = re.compile(rf"(?:{'|'.join(SCHEMES)})\s+(?=\S)", re.IGNORECASE).match(text, start)
    end = _end_of_piece(text, scheme.end() if scheme else start)
    # Pieces without a space between them are one value in a shell, and a call or an index in code.
    while end < len(text) and (following := _end_of_piece(text, end, joined=True)) > end:
        end = following
    return end


def _end_of_piece(text: str, start: int, *, joined: bool = False) -> int:
    """Return the end of a quoted text, of brackets and all in them, or of a run of other characters."""
    opening = OPENING.match(text, start)
    if opening:
        end = _end_of_quoted(text, opening.end(), len(opening[1]), opening[2])
        # Behind a value, a quote most often closes what is around it.
        return (
            start if joined and (end > len(text) or re.search(r"[\s,;)\]}]", text[start:end])) else min(end, len(text))
        )
    if text[start : start + 1] in tuple(BRACKETS):
        return _end_of_brackets(text, start)
    found = UNQUOTED.match(text, start)
    return found.end() if found else start


def _end_of_quoted(text: str, start: int, escapes: int, quote: str) -> int:
    """Return the place behind the quote that ends a text; more than the length of `text` if none does.

    A quote behind more backslashes than the first one lies in the text.
    """
    place = start
    while (place := text.find(quote, place)) >= 0:
        before = place
        while before > start and text[before - 1] == "\\":
            before -= 1
        if place - before <= escapes:
            return place + 1
        place += 1
    return len(text) + 1


def _end_of_brackets(text: str, start: int) -> int:
    """Return the place behind the bracket that closes the one at `start`; the end of `text` if none does."""
    depth, place = 0, start
    while place < len(text):
        char = text[place]
        if char in BRACKETS:
            depth += 1
        elif char in BRACKETS.values():
            depth -= 1
            if depth == 0:
                return place + 1
        elif opening := OPENING.match(text, place):
            place = _end_of_quoted(text, opening.end(), len(opening[1]), opening[2])
            continue
        place += 1
    return len(text)


def _is_no_value_yet(word: str) -> bool:
    """Return whether a word in the place of a secret can stand before it: a scheme, ``--``, or one more option."""
    return word == "--" or word.strip().lower() in SCHEMES or (word.startswith("-") and _names_secret(word))


def _names_secret(word: str) -> bool:
    """Return whether the words after this one may be secret: it is an option with a secret name and without a value."""
    option = OPTION.fullmatch(word)
    if option is None:
        whole = WHOLE.match(word)
        return whole is not None and _is_secret(whole[1]) and word[whole.end() :].strip().lower() in SCHEMES
    name = option[1] or option[2]
    # A bare word is a name only if it has parts: HF_TOKEN, user.password; not the word "key".
    return _is_secret(name) and (name != word or re.search(r"[a-z\d][_.-][a-z\d]", word, re.IGNORECASE) is not None)


def _is_secret(name: str) -> bool:
    """Return whether the name of an option or a variable says that its value is secret."""
    name = re.sub(r"%[0-9A-Fa-f]{2}", "-", name)
    words = re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower().rstrip("0123456789_-."))
    while len(words) > 1 and words[-1] in VALUE_WORDS:
        words.pop()
    glued = "".join(words)
    if words[-1] == "tokens" and (len([*filter(None, words)]) == 1 or words[-2] in OF_TOKENS):
        return True
    return words[-1] in LAST_WORDS or glued.endswith(ENDS) or any(part in glued for part in PARTS)
