"""Reading a folder of logs: rows of many processes, merged per call site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devguard import ConfigError
from devguard.logs import reader as log_reader


def row(number: int, pid: int = 1, line: int = 43, **changes: Any) -> dict[str, Any]:
    found = {
        "stray": number,
        "door": "load",
        "action": "repaired",
        "source": "cuda:0",
        "target": "cuda:1",
        "count": 1,
        "bytes": 8,
        "pid": pid,
        "site": {"file": "server.py", "line": line, "function": "receive"},
        "via": None,
        "note": None,
    }
    return found | changes


def write(folder: Path, pid: int, *lines: Any) -> None:
    first = {"process": {"pid": pid, "host": "node7", "command": "serve", "RANK": "3"}}
    text = [json.dumps(first), *(line if isinstance(line, str) else json.dumps(line) for line in lines)]
    (folder / f"{pid}.jsonl").write_text("\n".join(text) + "\n")


def test_the_last_line_of_a_row_counts(tmp_path: Path) -> None:
    write(tmp_path, 1, row(0), row(0, count=5, bytes=40))
    _, (site,), _ = log_reader.read(tmp_path)
    assert (site.count, site.bytes) == (5, 40)


def test_the_rows_of_one_call_site_are_merged_over_all_processes(tmp_path: Path) -> None:
    write(tmp_path, 1, row(0, pid=1, count=2), row(1, pid=1, line=99, bytes=100))
    write(tmp_path, 2, row(0, pid=2, count=3, target="cuda:2"))
    processes, (largest, merged), damaged = log_reader.read(tmp_path)
    assert [process.pid for process in processes] == [1, 2]
    assert (largest.line, largest.bytes) == (99, 100)
    assert (merged.line, merged.count, merged.bytes, merged.processes) == (43, 5, 16, [1, 2])
    assert merged.devices == ["cuda:0 -> cuda:1", "cuda:0 -> cuda:2"]
    assert merged.as_dict()["processes"] == [1, 2]
    assert damaged == []


def test_owners_and_ranks_are_merged_and_a_process_can_be_left_out(tmp_path: Path) -> None:
    write(tmp_path, 1, row(0, pid=1, owner="cuda:1", rank="1"), row(1, pid=1, owner="cpu", rank=None))
    write(tmp_path, 2, row(0, pid=2, count=3, owner="cuda:2", rank="2"))
    _, (site,), _ = log_reader.read(tmp_path)
    assert (site.owners, site.ranks, site.count) == (["cuda:1", "cpu", "cuda:2"], ["1", "2"], 5)
    processes, (site,), _ = log_reader.read(tmp_path, lambda process: process.pid == 2)
    assert (site.owners, site.ranks, site.count) == (["cuda:2"], ["2"], 3)
    assert [process.pid for process in processes] == [1, 2]


def test_a_stray_that_was_left_alone_names_one_device(tmp_path: Path) -> None:
    write(tmp_path, 1, row(0, action="observed", target="cuda:0", site=None))
    _, (site,), _ = log_reader.read(tmp_path)
    assert (site.devices, site.file, site.line) == (["cuda:0"], "", 0)


def test_a_process_without_a_last_line_has_not_ended(tmp_path: Path) -> None:
    end = {"end": {"process_owner": None, "owned": ["cuda:1"], "contexts": ["cuda:0", "cuda:1"]}}
    write(tmp_path, 1, end)
    write(tmp_path, 2)
    (ended, running), _, _ = log_reader.read(tmp_path)
    assert (ended.ended, ended.owner, ended.contexts) == (True, "cuda:1", ["cuda:0", "cuda:1"])
    assert (running.ended, running.owner, running.contexts) == (False, None, [])
    assert (running.host, running.command, running.rank) == ("node7", "serve", "3")


def test_a_line_for_a_child_names_the_end_of_that_process(tmp_path: Path) -> None:
    write(tmp_path, 1, {"child": {"pid": 2, "signal": "SIGKILL"}, "time": 5.0}, {"child": {"pid": 3, "code": 1}})
    write(tmp_path, 2)
    (parent, child), _, damaged = log_reader.read(tmp_path)
    assert (child.end, child.signal, child.code) == ("killed", "SIGKILL", None)
    assert [each.pid for each in parent.children] == [2]
    assert damaged == ["1.jsonl:3"]


@pytest.mark.parametrize("time", ["1e999", "true", '"5"', "null"])
def test_a_time_that_is_none_is_damage(tmp_path: Path, time: str) -> None:
    write(tmp_path, 1, '{"child": {"pid": 2, "code": 1}, "time": ' + time + "}")
    (parent,), _, damaged = log_reader.read(tmp_path)
    assert (parent.children, damaged) == ([], ["1.jsonl:2"])


def test_strays_without_room_in_the_journal_are_known(tmp_path: Path) -> None:
    write(tmp_path, 1, {"end": {"process_owner": None, "owned": [], "contexts": [], "strays_not_kept": 12}})
    write(tmp_path, 2, {"end": {"process_owner": None, "owned": [], "contexts": [], "strays_not_kept": -1}})
    processes, _, damaged = log_reader.read(tmp_path)
    assert [process.not_kept for process in processes] == [12, 0]
    assert damaged == ["2.jsonl:2"]


def test_the_transport_is_that_of_the_last_state(tmp_path: Path) -> None:
    state = {"process_owner": None, "owned": [], "contexts": []}
    write(tmp_path, 1, {"state": state}, {"state": state | {"transport": "host"}})
    write(tmp_path, 2, {"state": state | {"transport": "host"}}, {"end": state | {"transport": None}})
    write(tmp_path, 3, {"state": state | {"transport": 7}})
    processes, _, damaged = log_reader.read(tmp_path)
    assert [process.transport for process in processes] == ["host", None, None]
    assert damaged == ["3.jsonl:2"]


def test_damaged_lines_are_named_and_the_others_are_read(tmp_path: Path) -> None:
    write(tmp_path, 1, '{"stray": 0, "do', "", "[1]", row(0))
    _, sites, damaged = log_reader.read(tmp_path)
    assert damaged == ["1.jsonl:2", "1.jsonl:4"]
    assert len(sites) == 1


def test_a_folder_without_logs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        log_reader.read(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"holds no log.*devguard run --log"):
        log_reader.read(tmp_path)


JUNK = (None, True, -1, 1.5, 1 << 64, "", "x", [], [1], {}, {"a": 1}, [[]], "9" * 30)
FIELDS = {
    "process": ("pid", "host", "command", "RANK", "time", "started", "pid_space"),
    "child": ("pid", "signal", "code"),
    "end": ("process_owner", "owned", "contexts"),
    "": (
        "stray",
        "door",
        "action",
        "source",
        "target",
        "count",
        "bytes",
        "pid",
        "site",
        "via",
        "note",
        "owner",
        "rank",
    ),
    "site": ("file", "line", "function"),
}


@pytest.mark.parametrize("junk", JUNK, ids=repr)
@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in FIELDS.items() for name in names])
def test_a_value_of_a_wrong_type_is_damage_and_no_error(tmp_path: Path, part: str, name: str, junk: Any) -> None:
    lines: dict[str, Any] = {
        "process": {"process": {"pid": 1, "host": "node7", "command": "serve", "RANK": "3"}},
        "child": {"child": {"pid": 2, "signal": "SIGKILL"}, "time": 1.0},
        "end": {"end": {"process_owner": None, "owned": ["cuda:1"], "contexts": []}},
        "": row(0),
    }
    lines["site"] = lines[""]
    changed = lines[part] if not part else lines[part][part]
    changed[name] = junk
    text = "".join(json.dumps(lines[each]) + "\n" for each in ("process", "child", "", "end"))
    (tmp_path / "1.jsonl").write_text(text)
    processes, sites, _ = log_reader.read(tmp_path)
    assert all(isinstance(process.pid, int) and isinstance(process.command, str) for process in processes)
    assert all(isinstance(each, str) for process in processes for each in process.contexts)
    assert all(isinstance(process.time, float) and isinstance(process.end, str) for process in processes)
    assert all(isinstance(site.count, int) and isinstance(site.file, str) for site in sites)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=200) | ANY_JSON.map(lambda value: json.dumps(value).encode()), max_size=6))
def test_whatever_the_bytes_the_folder_is_read(tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / "1.jsonl").write_bytes(b"\n".join(lines))
    processes, sites, damaged = log_reader.read(tmp_path)
    assert len(damaged) <= sum(len(line.split(b"\n")) for line in lines)
    assert processes == sites == []


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([row(0), row(1, site=None)]), st.dictionaries(st.sampled_from(list(row(0))), ANY_JSON, max_size=3)
)
def test_whatever_the_values_the_sums_can_be_printed(
    tmp_path: Path, base: dict[str, Any], changes: dict[str, Any]
) -> None:
    write(tmp_path, 1, base | changes, base)
    _, sites, damaged = log_reader.read(tmp_path)
    assert len(damaged) <= 1
    assert str(sum(site.bytes + site.count for site in sites)).isdigit()


class Counted(int):
    """A process ID that counts the comparisons with others."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return int(self) == other

    __hash__ = int.__hash__


def test_the_rows_of_one_call_site_are_not_compared_with_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_reader, "as_number", Counted)
    count = 2000
    write(
        tmp_path,
        1,
        *[row(n, pid=n, target=f"cuda:{n}") for n in range(count)],
        *[row(count + n, pid=n) for n in range(5)],
    )
    Counted.compared = 0
    _, (site,), _ = log_reader.read(tmp_path)
    assert (site.count, site.processes) == (count + 5, list(range(count)))
    assert len(site.devices) == count
    assert Counted.compared < 20 * count
