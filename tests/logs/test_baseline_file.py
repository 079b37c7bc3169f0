"""The file of a baseline: what is written is read again, and whatever it holds, there is an answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devguard.errors import ConfigError
from devguard.logs import baseline_file
from devguard.logs.baseline import Baseline, Entry, Key
from tests.helpers.logs import EVIL, ROOT, site

ENTRY = {
    "file": "serve.py", "function": "receive", "door": "load", "action": "observed", "owner": "cuda", "lines": [43],
}  # fmt: skip


def written(path: Path, *rows: Any, **changes: Any) -> Path:
    path.write_text(json.dumps({"devguard_baseline": 1, "strays": list(rows)} | changes))
    return path


def test_what_is_written_is_read_again_and_equal_runs_write_equal_files(tmp_path: Path) -> None:
    sites = [site(43), site(50), site(function=EVIL, file=f"{ROOT}/é{EVIL}.py"), site(0, file="", function="")]
    first = Baseline.of(sites, ROOT, Baseline())
    with_reason = Baseline([*first.entries.values(), Entry(Key("a", "b", "c", "d", "e"), (1,), "ticket 7")])
    baseline_file.write(tmp_path / "a.json", with_reason)
    assert baseline_file.read(tmp_path / "a.json").entries == with_reason.entries
    baseline_file.write(tmp_path / "b.json", Baseline(reversed(list(with_reason.entries.values()))))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_file_has_one_line_for_each_entry(tmp_path: Path) -> None:
    baseline_file.write(tmp_path / "a.json", Baseline.of([site()], ROOT, Baseline()))
    _, mark, _, entry, *end = (tmp_path / "a.json").read_text().splitlines()
    assert mark == '  "devguard_baseline": 1,'
    assert json.loads(entry) == ENTRY
    assert end == ["  ]", "}"]
    baseline_file.write(tmp_path / "none.json", Baseline())
    assert baseline_file.read(tmp_path / "none.json").entries == {}


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (b"", "Expecting value: line 1 column 1"),
    "a script": (b"import torch\n", "Expecting value"),
    "a conflict of branches": (b'{"devguard_baseline": 1,\n<<<<<<< HEAD\n', "line 2 column 1"),
    "bytes": (b"\xff\xfe\0{", "Expecting value"),
    "deep": (b"[" * 200_000, "nested too deeply"),
    "a huge number": (b'{"devguard_baseline": ' + b"9" * 10_000 + b"}", "too large"),
    "no number": (b'{"devguard_baseline": NaN}', "NaN is not JSON"),
    "a list": ([], 'no JSON object with the key "devguard_baseline"'),
    "another object": ({"version": 1}, 'no JSON object with the key "devguard_baseline"'),
    "a newer version": ({"devguard_baseline": 2}, '"devguard_baseline" is 2, and this release of devguard reads 1'),
    "a version that is none": ({"devguard_baseline": True}, "is true, and"),
    "a version of a text": ({"devguard_baseline": EVIL}, "this release of devguard reads 1"),
    "no strays": ({"devguard_baseline": 1}, '"strays" is missing'),
    "strays of another kind": ({"devguard_baseline": 1, "strays": {}}, '"strays" is missing, or is no list'),
    "an entry of another kind": ({"devguard_baseline": 1, "strays": [ENTRY, 7]}, "strays[1] is no object"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_baseline_is_an_error_that_says_why(tmp_path: Path, name: str) -> None:
    content, reason = WRONG[name]
    path = tmp_path / "base.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ConfigError) as caught:
        baseline_file.read(path)
    assert str(caught.value).startswith(f"{path} is no baseline of devguard: ")
    assert reason in str(caught.value)
    assert "--write-baseline" in str(caught.value)


@pytest.mark.parametrize("junk", [None, True, -1, 1.5, 1 << 63, "", [], [1], [True], {}, ["43"]], ids=repr)
@pytest.mark.parametrize("name", [*ENTRY, "reason"])
def test_a_value_of_another_type_is_an_error_with_its_place(tmp_path: Path, name: str, junk: Any) -> None:
    path = written(tmp_path / "base.json", ENTRY, ENTRY | {name: junk})
    valid = {"lines": ["[1]"], "reason": ["None", "''"]}
    if repr(junk) in valid.get(name, ["''"]):
        assert baseline_file.read(path).entries
    else:
        with pytest.raises(ConfigError, match=rf'strays\[1\]: "{name}" is'):
            baseline_file.read(path)


def test_what_a_newer_release_adds_to_an_entry_is_ignored(tmp_path: Path) -> None:
    path = written(tmp_path / "base.json", ENTRY | {"since": "today"}, about="known strays")
    assert len(baseline_file.read(path).entries) == 1


def test_a_file_that_cannot_be_read_or_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json does not exist\. Write it: devguard log DIR --write-baseline"):
        baseline_file.read(tmp_path / "none.json")
    for path, reason in (tmp_path, "Is a directory"), (tmp_path / "a\0b", "null byte"), (tmp_path / "x" / "y", ""):
        with pytest.raises(ConfigError, match=f"cannot be written: .*{reason}"):
            baseline_file.write(path, Baseline())
        if reason:
            with pytest.raises(ConfigError, match=f"cannot be read: .*{reason}"):
                baseline_file.read(path)


def test_a_file_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than 32 MiB"):
        baseline_file.read(Path("/dev/zero"))


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    other = tmp_path / "train.py"
    other.write_text("import torch\n")
    with pytest.raises(ConfigError, match="is no baseline"):
        baseline_file.read_reasons(other)
    for empty in (tmp_path / "none.json", tmp_path / "touched.json", Path(os.devnull), tmp_path / "a\0b"):
        if empty.name == "touched.json":
            empty.touch()
        assert baseline_file.read_reasons(empty).entries == {}


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.dictionaries(st.sampled_from([*ENTRY, "reason"]), ANY_JSON, max_size=3).map(lambda changes: ENTRY | changes)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=100)
    | ANY_JSON.map(lambda value: json.dumps(value).encode())
    | st.lists(ROWS, max_size=3).map(lambda rows: json.dumps({"devguard_baseline": 1, "strays": rows}).encode())
)
def test_whatever_the_bytes_it_is_a_baseline_or_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "base.json"
    path.write_bytes(content)
    try:
        known = baseline_file.read(path)
    except ConfigError:
        return
    known.compare([site()], ROOT)
    baseline_file.write(tmp_path / "again.json", known)
    assert baseline_file.read(tmp_path / "again.json").entries == known.entries
