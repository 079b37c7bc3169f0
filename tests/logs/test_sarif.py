"""A log as SARIF: the parts that the published schema of 2.1.0 requires, and what code scanning needs.

`REQUIRED` and `VALUES` are excerpts of sarif-schema-2.1.0.json by OASIS.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from devguard.logs.sarif import as_sarif
from devguard.logs.summary import Summary
from tests.helpers.logs import EVIL, judged, process, site, summary

REQUIRED = {
    "driver": {"name"},
    "invocations": {"executionSuccessful"},
    "logicalLocations": {"name"},
    "message": {"text"},
    "results": {"message"},
    "rules": {"id"},
    "runs": {"tool"},
    "shortDescription": {"text"},
    "help": {"text"},
    "tool": {"driver"},
    "toolExecutionNotifications": {"message"},
}
VALUES = {
    "level": {"none", "note", "warning", "error"},
    "baselineState": {"new", "unchanged", "updated", "absent"},
    "version": {"2.1.0"},
}


def check(value: Any, name: str = "") -> None:
    """Check the objects of a log by the names under which they stand."""
    for each in value if isinstance(value, list) else [value]:
        if not isinstance(each, dict):
            continue
        assert REQUIRED.get(name, set()) <= each.keys(), name
        for key, inner in each.items():
            if key in VALUES and name != "driver":
                assert inner in VALUES[key]
            check(inner, key)


def results(found: Summary) -> list[dict[str, Any]]:
    log = json.loads(json.dumps(as_sarif(found)))
    assert {"version", "runs"} <= log.keys()
    check(log)
    (run,) = log["runs"]
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        for location in result.get("locations", ()):
            physical = location["physicalLocation"]
            artifact = physical["artifactLocation"]
            assert re.fullmatch(r"[!-~]+", artifact["uri"])
            assert bool(urlsplit(artifact["uri"]).scheme) != ("uriBaseId" in artifact)
            assert artifact.get("uriBaseId", "%SRCROOT%") in run["originalUriBaseIds"]
            assert physical.get("region", {"startLine": 1})["startLine"] >= 1
    assert run["originalUriBaseIds"]["%SRCROOT%"]["uri"].endswith("/")
    return list(run["results"])


def test_each_call_site_is_a_result_at_its_line() -> None:
    (result,) = results(summary(site(count=3, ranks=["1", "2"], via="zmq", note="a note")))
    assert (result["ruleId"], result["level"]) == ("load", "warning")
    assert result["message"]["text"] == (
        "cuda:0: observed by the door load, 3 x, 1.0 MiB in ranks 1, 2; via zmq; a note"
    )
    assert result["locations"] == [
        {
            "physicalLocation": {
                "artifactLocation": {"uri": "serve.py", "uriBaseId": "%SRCROOT%"},
                "region": {"startLine": 43},
            },
            "logicalLocations": [{"name": "receive", "kind": "function"}],
        }
    ]


def test_the_level_follows_the_action() -> None:
    sites = [site(action=action) for action in ("repaired", "refused", "observed", "warned", "moved")]
    assert [each["level"] for each in results(summary(*sites))] == ["note", "error", "warning", "warning", "warning"]


@pytest.mark.parametrize(
    ("file", "uri"),
    [
        ("/srv/program/a b%é:#?.py", "a%20b%25%C3%A9%3A%23%3F.py"),
        ("/opt/serve.py", "file:///opt/serve.py"),
        ("/srv/program/\udcff.py", "%ED%B3%BF.py"),
        ("serve.py", "serve.py"),
    ],
    ids=ascii,
)
def test_files_are_relative_uris_where_possible(file: str, uri: str) -> None:
    (result,) = results(summary(site(file=file)))
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == uri
    assert unquote(uri)


@pytest.mark.parametrize("file", ["", "<string>"])
def test_a_stray_without_a_line_has_no_location(file: str) -> None:
    (result,) = results(summary(site(0, file=file)))
    assert "locations" not in result


@pytest.mark.parametrize("line", [0, 1 << 31])
def test_a_line_that_readers_cannot_hold_is_left_out(line: int) -> None:
    (result,) = results(summary(site(line)))
    assert "region" not in result["locations"][0]["physicalLocation"]


def test_records_that_are_no_strays_are_left_out_unless_the_gate_fails_on_them() -> None:
    kept = site(action="kept")
    assert results(summary(kept)) == []
    found = judged(kept)
    assert found.gate is not None
    found.gate.failing.append(kept)
    assert [each["properties"]["action"] for each in results(found)] == ["kept"]


def test_the_state_against_the_baseline_is_named() -> None:
    found = judged(site(), site(90, function="send"), known=[site()])
    assert [each["baselineState"] for each in results(found)] == ["unchanged", "new"]
    assert "baselineState" not in results(judged(site()))[0]


def test_a_fingerprint_survives_a_move_and_tells_lines_apart() -> None:
    def prints(*lines: int) -> list[str]:
        found = results(summary(*map(site, lines)))
        return [each["partialFingerprints"]["devguardCallSite/v1"] for each in found]

    assert prints(43, 50) == prints(45, 60)
    assert prints(50, 43) == prints(43, 50)[::-1]
    assert len(set(prints(43, 50))) == 2


def test_what_was_not_seen_is_a_notification() -> None:
    died = process(8, ended=False, end="killed", signal="SIGKILL")
    found = as_sarif(summary(processes=[died, process(alerts=["the guard is off"])], damaged=["1.jsonl:2"]))
    (invocation,) = found["runs"][0]["invocations"]
    assert invocation["executionSuccessful"] is False
    assert [(each["level"], each["message"]["text"]) for each in invocation["toolExecutionNotifications"]] == [
        ("warning", "pid 7: the guard is off"),
        ("warning", "pid 8 killed by SIGKILL"),
        ("error", "cannot be read: 1.jsonl:2"),
    ]


def test_whatever_a_log_holds_it_is_valid() -> None:
    evil = site(door=EVIL, action=EVIL, file=EVIL, function=EVIL, devices=[EVIL], owners=[EVIL], via=EVIL, note=EVIL)
    (result,) = results(judged(evil, site(file=f"/{EVIL}"), known=[], damaged=[EVIL], root=f"/{EVIL}"))[:1]
    assert result["message"]["text"].isprintable()
