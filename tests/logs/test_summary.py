"""What is shown in each format."""

from __future__ import annotations

import json

from devguard.logs.summary import count
from tests.helpers.logs import process, site, summary


def test_records_that_are_no_strays_are_apart() -> None:
    found = summary(site(), site(action="kept"), site(action="placed", count=3), site(action="kept", count=2))
    assert [each.action for each in found.strays] == ["observed"]
    assert found.count_others() == "3 kept, 3 placed"
    assert summary(site()).count_others() == ""


def test_a_place_is_relative_where_possible() -> None:
    assert summary().place(site()) == "serve.py:43 in receive"
    assert summary().place(site(file="/opt/serve.py")) == "/opt/serve.py:43 in receive"
    assert summary().place(site(file="")) == "no line of user code"


def test_processes_that_died_and_alerts_are_named() -> None:
    found = summary(processes=[process(7, alerts=["off"]), process(8, ended=False, end="killed", signal="SIGKILL")])
    assert [each.pid for each in found.died] == [8]
    assert found.alerts == [(7, "off")]
    (alert,) = summary(processes=[process(7, not_kept=1)]).alerts
    assert alert == (7, "1 stray at further lines: its log has no room for more lines")


def test_the_process_that_died_first_comes_first_because_it_is_the_cause() -> None:
    ends: dict[int, float | None] = {7: 30.0, 8: None, 9: 10.0}
    found = summary(processes=[process(pid, end="killed", end_time=time) for pid, time in ends.items()])
    assert [each.pid for each in found.died] == [9, 7, 8]


def test_it_is_plain_data() -> None:
    found = json.loads(json.dumps(summary(site(), site(action="kept"), damaged=["1.jsonl:2"]).as_dict()))
    assert [each["is_stray"] for each in found["strays"]] == [True, False]
    assert found["damaged"] == ["1.jsonl:2"]
    assert found["processes"][0]["end"] == "ended"
    assert "gate" not in found


def test_a_number_has_its_noun() -> None:
    assert [count(number, "line") for number in (0, 1, 2)] == ["0 lines", "1 line", "2 lines"]
    assert count(2, "process", "processes") == "2 processes"
