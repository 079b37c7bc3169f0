"""What ``devguard log`` prints; tests/process/test_logs.py reads the logs of real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from devguard import cli
from devguard.reporting.actions import ACTIONS
from tests.helpers.simulated import ROOT

SITE = {"file": "/srv/server.py", "line": 43, "function": "receive"}


def write_log(folder: Path, pid: int, **changes: Any) -> None:
    """Write the log of a process that strayed at one call site."""
    stray = {
        "stray": 0,
        "door": "load",
        "action": "repaired",
        "source": "cuda:0",
        "target": "cuda:1",
        "count": 2,
        "bytes": 3 << 20,
        "pid": pid,
        "site": SITE,
        "via": None,
        "note": None,
    }
    end = {"process_owner": "cuda:1", "owned": ["cuda:1"], "contexts": ["cuda:1"]}
    lines = [{"process": {"pid": pid, "host": "node7", "command": "serve"}}, stray | changes, {"end": end}]
    (folder / f"{pid}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def shown(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    assert cli.main(["log", str(folder), *options]) == 0
    return capsys.readouterr().out


def test_each_call_site_is_shown_with_its_size_and_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7, via="joblib", note="a note")
    out = shown(capsys, tmp_path)
    assert out.startswith("1 process(es), 2 stray(s) at 1 call site(s), 3.0 MiB\n")
    assert "3.0 MiB  2 x  load: cuda:0 -> cuda:1 [repaired]" in out
    assert "at /srv/server.py:43 in receive (via joblib)" in out
    assert "a note" in out
    assert "node7" not in out


def test_a_stray_without_a_call_site_is_shown_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7, site=None)
    assert "at no line of user code" in shown(capsys, tmp_path)


def test_a_long_list_of_processes_is_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pid in range(11, 22):
        write_log(tmp_path, pid)
    out = shown(capsys, tmp_path)
    assert "in pid 11, 12, 13, 14, 15, 16, 17, 18 and 3 more" in out
    assert "22 x  load" in out


def test_the_processes_are_listed_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7)
    assert "pid 7 on node7: ended; owned cuda:1, contexts cuda:1\n    serve" in shown(capsys, tmp_path, "--processes")


def test_a_transport_is_listed_with_its_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7)
    with (tmp_path / "7.jsonl").open("a") as file:
        state = {"process_owner": "cuda:1", "owned": ["cuda:1"], "contexts": [], "transport": "host"}
        file.write(json.dumps({"end": state}) + "\n")
    assert "owned cuda:1, contexts none, transport host\n" in shown(capsys, tmp_path, "--processes")


def test_processes_that_died_are_listed_in_any_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7)
    for pid in (8, 9):
        write_log(tmp_path, pid)
        text = (tmp_path / f"{pid}.jsonl").read_text().replace('{"end": {', '{"state": {')
        (tmp_path / f"{pid}.jsonl").write_text(text)
    child = {"child": {"pid": 8, "signal": "SIGKILL"}, "time": 1.5}
    with (tmp_path / "7.jsonl").open("a") as file:
        file.write(json.dumps(child) + "\n")
    out = shown(capsys, tmp_path)
    assert "\npid 8 on node7: killed by SIGKILL; owned cuda:1, contexts cuda:1\n    serve\n" in out
    assert "pid 7 on" not in out
    assert "pid 9 on" not in out  # Nothing tells whether it still runs.
    (_, killed, _) = json.loads(shown(capsys, tmp_path, "--json"))["processes"]
    assert (killed["ended"], killed["end"], killed["signal"], killed["code"]) == (False, "killed", "SIGKILL", None)


def test_json_holds_the_processes_and_the_strays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7)
    found = json.loads(shown(capsys, tmp_path, "--json"))
    assert [process["owner"] for process in found["processes"]] == ["cuda:1"]
    assert [(site["file"], site["line"], site["count"]) for site in found["strays"]] == [("/srv/server.py", 43, 2)]
    assert found["damaged"] == []


def plant(folder: Path) -> None:
    """Fill a folder of logs with whatever another user could put there."""
    text = "\x1b[2J\x1b]0;title\x07\x9b31m\r\u202eevil\n\x00\x7f"
    write_log(
        folder, 7, note=text, via=text, source=text, action=text, site={"file": text, "line": 1, "function": text}
    )
    process = {"process": {"pid": 8, "host": text, "command": text * 10**4, "RANK": text}}
    alert = {"alert": text}
    end = {"end": {"process_owner": text, "owned": [text], "contexts": [text]}}
    lines = "".join(json.dumps(line) + "\n" for line in (process, alert, end))
    (folder / "8.jsonl").write_text(lines)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\x1b[31m.jsonl")).write_bytes(b"\xff\xfe\x00{")
    (folder / "deep.jsonl").write_bytes(b'{"process":' * 100_000)
    (folder / "long.jsonl").write_bytes(b'{"stray": "' + b"x" * (30 << 20) + b'"}\n')
    (folder / "nul.jsonl").write_bytes(b"\0" * 4096 + b"\n\x1b[31m")
    (folder / "numbers.jsonl").write_text('{"stray": 1e999}\n{"stray": NaN}\n{"stray": ' + "9" * 10**5 + "}\n")
    (folder / "folder.jsonl").mkdir()
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    (folder / "device.jsonl").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jsonl")


OPTIONS: list[list[str]] = [[], ["--processes"], ["--json"]]


@pytest.mark.parametrize(
    ("options", "encoding"),
    [
        *((options, encoding) for options in OPTIONS for encoding in ("utf-8", "ascii", "latin-1")),
        (["--format", "md"], "ascii"),
        (["--format", "sarif"], "utf-8"),
    ],
    ids=str,
)
def test_a_hostile_folder_gives_no_traceback_and_no_escapes(tmp_path: Path, options: list[str], encoding: str) -> None:
    plant(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "devguard", "log", str(tmp_path), *options],
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        cwd=ROOT,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (1, b"")
    shown = done.stdout.decode(encoding)
    assert shown.replace("\n", "").isprintable()
    assert "pipe.jsonl: not a regular file" in shown
    if options == ["--json"]:
        assert {process["pid"] for process in json.loads(shown)["processes"]} == {7, 8}
    elif not options or options == ["--processes"]:
        assert r"\x1b[2J\x1b]0;title\x07\x9b31m\r\u202eevil\n\x00\x7f" in shown
        assert "\nevil" not in shown


def test_a_hostile_name_of_a_folder_is_reported_without_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("\x1b[31m\nred", "\udcff", "x" * 5000):
        assert cli.main(["log", str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "\x1b" not in err
        assert "Name " in err


def test_output_that_nothing_reads_ends_the_command_quietly(tmp_path: Path) -> None:
    for pid in range(1, 400):
        write_log(tmp_path, pid, site={"file": f"{pid}.py" * 50, "line": 1, "function": "f"})
    command = f"{sys.executable} -m devguard log {tmp_path} --processes | head -1"
    done = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_command_lines_are_cut_to_the_width_of_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    write_log(tmp_path, 7)
    line = {"process": {"pid": 8, "host": "h", "command": "python -c '" + "漢字\n" * 200}}
    (tmp_path / "8.jsonl").write_text(json.dumps(line) + "\n")
    (command,) = (line for line in shown(capsys, tmp_path, "--processes").splitlines() if "python -c" in line)
    assert command.startswith("    python -c '漢字\\n漢字")
    assert command.endswith("...")
    assert sum(1 + (char in "漢字") for char in command) <= 60


@pytest.mark.parametrize(
    ("door", "site", "is_shown"), [("native", None, True), ("native", SITE, False), ("load", None, False)]
)
def test_a_context_without_a_line_has_a_next_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], door: str, site: Any, is_shown: bool
) -> None:
    write_log(tmp_path, 7, door=door, site=site)
    assert ("devguard run --trace-contexts" in shown(capsys, tmp_path)) is is_shown


def test_a_long_list_of_devices_is_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pid in range(1, 12):
        write_log(tmp_path, pid, source=f"cuda:{pid}")
    assert "cuda:6 -> cuda:1 and 3 more [repaired]" in shown(capsys, tmp_path)


def test_a_file_that_was_cut_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7)
    with open(tmp_path / "8.jsonl", "wb") as file:
        file.truncate(200 << 30)
    assert cli.main(["log", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "cannot be read: 8.jsonl: only its beginning is read, because line 1 does not end" in out
    assert "at /srv/server.py:43" in out


def devguard(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run ``devguard log``; return its status, and what it printed on standard output and standard error."""
    status = cli.main(["log", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_placed_and_kept_records_are_not_counted_as_strays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7, action="placed")
    write_log(tmp_path, 8, action="kept", count=5)
    out = shown(capsys, tmp_path)
    assert out.startswith(
        "2 process(es), 0 stray(s) at 0 call site(s), 0 B\nnot counted as strays: 5 kept, 2 placed at 2 call site(s)\n"
    )
    assert "[placed]" in out
    assert "[kept]" in out
    assert devguard(capsys, tmp_path, "--fail-on", "strays")[0] == 0
    assert devguard(capsys, tmp_path, "--fail-on", "kept")[0] == 3


def test_records_of_single_doors_and_ranks_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pid, door in enumerate(("load", "ipc", "native"), 1):
        write_log(tmp_path, pid, door=door, count=pid, bytes=0)
        text = (tmp_path / f"{pid}.jsonl").read_text()
        (tmp_path / f"{pid}.jsonl").write_text(text.replace('"pid"', f'"RANK": "{pid}", "pid"', 1))
    assert shown(capsys, tmp_path, "--door", "load,ipc").startswith("3 process(es), 3 stray(s) at 2 call site(s)")
    assert shown(capsys, tmp_path, "--rank", "3").startswith("1 process(es), 3 stray(s) at 1 call site(s)")
    out = shown(capsys, tmp_path, "--rank", "1", "--rank", "3", "--sort", "count")
    assert out.index("native") < out.index("load")


WRONG = {
    "--door lod": "--door lod: there is no such door. Valid: artefacts, bare_cuda, ",
    "--rank 4": "--rank 4: the log has no process with that rank. Valid: none.\n",
    "--fail-on repaired,moved": "--fail-on moved: there is no such name. Valid: strays, repaired, refused, observed, ",
    "--baseline none.json": "none.json does not exist. Write it: devguard log DIR --write-baseline FILE\n",
}


@pytest.mark.parametrize("options", WRONG)
def test_a_wrong_name_is_an_error_with_the_valid_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    write_log(tmp_path, 7)
    status, out, err = devguard(capsys, tmp_path, *options.split())
    assert (status, out) == (2, "")
    assert err.startswith(f"devguard log: {WRONG[options]}")


def test_a_baseline_passes_until_a_new_line_strays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs, base = tmp_path / "logs", tmp_path / "base.json"
    logs.mkdir()
    write_log(logs, 7)
    assert devguard(capsys, logs, "--write-baseline", base)[::2] == (0, f"{base}: 1 known (added 1, removed 0)\n")
    status, out, _ = devguard(capsys, logs, "--baseline", base)
    assert (status, out.splitlines()[-1].split(" (")[0]) == (
        0,
        f"passes: no new call site with strays, besides 1 known one in {base}",
    )
    write_log(logs, 8, site=SITE | {"line": 90, "function": "send"}, action="observed")
    (logs / "7.jsonl").unlink()
    status, out, _ = devguard(capsys, logs, "--baseline", base, "--root", "/srv")
    assert status == 3
    assert "\n  server.py:90 in send: load: cuda:0 -> cuda:1 [observed] 2 x\n" in out
    assert out.splitlines()[-1] == "vanished: load [repaired], owner unknown, at /srv/server.py:43 in receive"
    assert devguard(capsys, logs, "--baseline", base, "--fail-on", "refused")[0] == 0
    gate = json.loads(devguard(capsys, logs, "--baseline", base, "--json")[1])["gate"]
    assert (gate["passes"], [each["line"] for each in gate["failing"]]) == (False, [90])
    assert devguard(capsys, logs, "--write-baseline", base)[2] == f"{base}: 1 known (added 1, removed 1)\n"
    assert devguard(capsys, logs, "--baseline", base)[0] == 0


def test_a_baseline_that_is_written_again_keeps_its_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs, base = tmp_path / "logs", tmp_path / "base.json"
    logs.mkdir()
    write_log(logs, 7)
    devguard(capsys, logs, "--write-baseline", base)
    base.write_text(base.read_text().replace('"lines": [43]', '"lines": [43], "reason": "ticket 7"'))
    devguard(capsys, logs, "--write-baseline", base)
    assert '"reason": "ticket 7"' in base.read_text()


def test_a_gate_over_damaged_lines_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7)
    (tmp_path / "8.jsonl").write_text("{\n")
    assert devguard(capsys, tmp_path, "--fail-on", "observed")[0] == 1
    assert devguard(capsys, tmp_path, "--fail-on", "repaired")[0] == 3


@pytest.mark.parametrize("options", ["--baseline", "--door load", "--rank none"])
def test_options_that_contradict_the_writing_of_a_baseline_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    write_log(tmp_path, 7)
    base = tmp_path / "base.json"
    words = options.split() if " " in options else [options, base]
    status, out, err = devguard(capsys, tmp_path, "--write-baseline", base, *words)
    assert (status, out) == (2, "")
    assert options.split()[0] in err
    assert not base.exists()


def test_a_hostile_baseline_is_an_error_without_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7)
    base = tmp_path / "\x1b[31mbase\n.json"
    for content in (b"\x1b[31m", b'{"devguard_baseline": "\\u001b[31m"}', b"[" * 100_000, b"\xff" * 100):
        base.write_bytes(content)
        for option in ("--baseline", "--write-baseline"):
            status, out, err = devguard(capsys, tmp_path, option, base)
            assert (status, out) == (2, "")
            assert err.startswith(f"devguard log: {tmp_path}/\\x1b[31mbase")
            assert "\x1b" not in err
        assert base.read_bytes() == content


def test_the_log_is_printed_as_markdown_and_as_sarif(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7)
    assert shown(capsys, tmp_path, "--format", "md").startswith("### devguard: 1 line with strays\n")
    log = json.loads(shown(capsys, tmp_path, "--format", "sarif", "--root", "/srv"))
    (result,) = log["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "server.py"


def test_help_explains_each_action(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main(["log", "--help"])
    out = capsys.readouterr().out
    for action, meaning in ACTIONS.items():
        assert f"  {action:<10}{meaning.text}\n" in out
