"""The prose of the package is plain English, in which code is not a person: ten rules of CONTRIBUTING.md in one test.

It reads comments, docstrings and the other strings of `devguard`, the comments of its C sources, and the documentation.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = sorted((ROOT / "devguard").rglob("*.py"))
C = sorted(path for kind in ("*.c", "*.h") for path in (ROOT / "devguard").rglob(f"csrc/{kind}"))
DOCUMENTS = [
    path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")) if path.exists()
]

FORBIDDEN = re.compile(
    r"\b(whoever|whom(?:ever)?|anew|(?:no|some|any|every)body|of any make|by itself|be it|were it|shall|who|whose)\b",
    re.IGNORECASE,
)
# Phrases in which "who" or "whose" means a person.
ABOUT_PERSONS = re.compile(r"\b(?:users?|readers?|people|authors?|developers?|teams?) who(?:se)?\b", re.IGNORECASE)
LONGEST_DOCSTRING = 11  # lines of a module docstring: a summary and ten more


def python_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Return the comments and the strings of a Python file, by line."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) or token.type == getattr(tokenize, "FSTRING_MIDDLE", -1):
            yield token.start[0], token.string


def c_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Return the comments of a C file, by line."""
    text = path.read_text()
    for comment in re.finditer(r"/\*.*?\*/|//[^\n]*", text, re.DOTALL):
        yield text.count("\n", 0, comment.start()) + 1, comment[0]


def found_in(path: Path) -> Iterator[str]:
    """Return each forbidden word of a file, as file:line: word."""
    reader = {".py": python_prose, ".c": c_prose, ".h": c_prose}.get(path.suffix)
    for start, text in reader(path) if reader else [(1, path.read_text())]:
        prose = ABOUT_PERSONS.sub(lambda phrase: "-" * len(phrase[0]), text)
        for word in FORBIDDEN.finditer(prose):
            yield f"{path.relative_to(ROOT)}:{start + prose.count(chr(10), 0, word.start())}: {word[0]}"


def test_no_comment_docstring_or_message_treats_code_as_a_person() -> None:
    found = [place for path in (*PYTHON, *C, *DOCUMENTS) for place in found_in(path)]
    assert not found, "\n".join([f"{len(found)} words to replace:", *found])


def test_module_docstrings_are_short() -> None:
    lengths = {path: len((ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()) for path in PYTHON}
    long = [f"{path.relative_to(ROOT)}: {lines}" for path, lines in lengths.items() if lines > LONGEST_DOCSTRING]
    assert not long, "\n".join([f"Module docstrings of more than {LONGEST_DOCSTRING} lines:", *long])
