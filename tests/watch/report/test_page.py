"""The page: its numbers are the log's, nothing in the log becomes part of the page, and it needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from pathlib import Path

import pytest

from devguard.watch.cells import VERDICTS
from devguard.watch.report import page
from devguard.watch.report.moments import CLASSES
from devguard.watch.report.page import Limits
from devguard.watch.report.run import read
from tests.helpers.journals import MIB, Log, make_run
from tests.helpers.pages import Page

EVIL = """</td></script><script>alert(1)</script><img src=x onerror=alert(2)> " ' & \u202e\x1b[31m\ud800 {{x}} $title"""


def render(folder: Path, **limits: int) -> Page:
    return Page(page.render([("", read(folder))], Limits(**limits)))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return render(make_run(tmp_path_factory.mktemp("run")))


def test_the_verdict_is_the_first_thing_on_the_page(shown: Page) -> None:
    assert (
        "2 of 4 processes put up to 7.0 MiB and 2 contexts on GPUs that are not theirs; 8 strays at 1 line: "
        "3 observed, 5 repaired." in shown.texts[""]
    )
    assert {"class": "verdict strays"} in shown.attributes("p")


def test_the_matrix_shows_the_worst_moment_without_a_script(shown: Page) -> None:
    assert shown.table("process")[:6] == [
        ["process", "pid", "owner", "mode", "GPU 0", "GPU 1", "GPU 2", "GPU 3"],
        ["rank 0 serve.py", "10", "cuda:0", "repair", "own 100.0 MiB", "-", "-", "-"],
        ["rank 1 serve.py", "11", "cuda:1", "repair", "STRAY 7.0 MiB", "own 210.0 MiB", "-", "-"],
        ["rank 2 serve.py", "12", "cuda:2", "repair", "ctx 0 B", "-", "own 300.0 MiB", "-"],
        ["rank 3 serve.py", "13", "cuda:3", "repair", "-", "-", "-", "own 400.0 MiB"],
        ["all", "107.0 MiB", "210.0 MiB", "300.0 MiB", "400.0 MiB"],
    ]
    stray = 7 * MIB + 512
    assert shown.values[0] == [
        *(100 * MIB, stray, 210 * MIB, 0, 300 * MIB, 400 * MIB),
        *(100 * MIB + stray, 210 * MIB, 300 * MIB, 400 * MIB),
    ]


def test_the_slider_has_every_moment_to_the_byte(shown: Page) -> None:
    (data,) = [json.loads(text) for found, text in shown.scripts if found.get("type") == "application/json"]
    assert data["moments"][data["worst"]]["label"].endswith("6.0 s after the start (the worst moment)")
    cells: dict[tuple[int, int], tuple[str, int | None]] = {}
    held = []
    for moment in data["moments"]:
        for row, column, *value in moment["set"]:
            if value:
                cells[row, column] = data["verdicts"][value[0]], value[1]
            else:
                del cells[row, column]
        held.append(cells.get((1, 0)))
        assert moment["all"] == [
            sum(size or 0 for (_, at), (_, size) in cells.items() if at == column) for column in range(4)
        ]
    assert [held[i] for i in range(len(held)) if i == 0 or held[i] != held[i - 1]] == [
        None,
        ("ctx", None),
        ("STRAY", 3 * MIB + 512),
        ("STRAY", 7 * MIB + 512),
        ("STRAY", MIB),
    ]
    assert {place: size for place, (_, size) in cells.items()} == {  # The last one has been killed.
        (0, 0): 100 * MIB,
        (1, 0): MIB,
        (1, 1): 210 * MIB,
        (2, 0): 0,
        (2, 2): 300 * MIB,
    }


def test_the_strays_have_the_numbers_of_the_log_and_what_to_write_there(shown: Page) -> None:
    table = shown.table("line")
    assert [row[1:6] for row in table] == [
        ["bytes", "count", "door", "before → after", "action"],
        ["3.0 MiB", "3", "load", "cuda:0", "observed"],
        ["5.0 MiB", "5", "load", "cuda:0 -> cuda:1", "repaired"],
    ]
    assert table[1][0].startswith("/srv/train.py:7 in main")
    assert "Write there: The bytes carry the sender's device. Pass map_location" in table[1][0]
    assert table[1][6:8] == ["rank 1 serve.py (pid 11); rank 1; owner cuda:1", "repair"]
    assert shown.values[shown.tables.index(table)] == [3 * MIB + 1, 3, 5 * MIB, 5]


def test_the_other_sections(shown: Page) -> None:
    contexts = shown.table("first seen")
    assert [row[1:4] for row in contexts[1:]] == [
        ["rank 2 serve.py (pid 12)", "cuda:0 (GPU 0)", "ctx"],
        ["rank 1 serve.py (pid 11)", "cuda:0 (GPU 0)", "STRAY"],
    ]
    assert contexts[2][4] == "/srv/train.py:7 in main (door load)"
    assert "Not listed: 4 contexts of processes on GPUs that they own." in shown.texts["contexts"]
    assert shown.texts["processes"].count("devguard 0.1.0; torch 2.13.0") == 1
    assert "killed by SIGKILL" in shown.texts["unseen"]
    assert "transport" not in shown.texts
    peaks = shown.table("GPU")
    assert peaks[1][0] == "GPU 0"
    assert peaks[1][3] == "own rank 0 serve.py (pid 10) 100.0 MiBSTRAY rank 1 serve.py (pid 11) 7.0 MiB"


def test_nothing_in_a_log_becomes_part_of_the_page(tmp_path: Path) -> None:
    known = {"command": f"python {EVIL}", "RANK": EVIL, "CUDA_VISIBLE_DEVICES": EVIL, "torch": EVIL, "host": EVIL}
    log = Log(tmp_path, 1, **known)
    gpus = {EVIL: EVIL, "cuda:1": "uuid-1"}
    log.state(1.0, EVIL, [EVIL, "cuda:0"], gpus=gpus, said_by=f"SGLang {EVIL}", process_mode=EVIL, transport=EVIL)
    site = {"file": f"/{EVIL}.py", "line": 3, "function": EVIL}
    log.stray(2.0, EVIL, EVIL, door=EVIL, action=EVIL, site=site, via=EVIL, note=EVIL, rank=EVIL, owner=EVIL)
    log.stray(2.0, EVIL, EVIL, door=EVIL, action="kept", site=site)
    arenas = [{"kind": EVIL, "budget": EVIL, EVIL: EVIL, "oldest": {EVIL: EVIL}, "wait_seconds": EVIL}]
    log.sample(3.0, {EVIL: 5, "cuda:0": 7}, arenas=arenas)
    log.alert(EVIL)
    log.write("not json " + EVIL.replace("\ud800", ""))
    log.end(4.0, contexts=[EVIL, "cuda:0"])
    folder = tmp_path / "<script>alert(3)<"
    folder.mkdir()
    Log(folder, 2, **known)
    source = page.render([(EVIL, read(tmp_path)), (EVIL, read(folder))])
    found = Page(source)
    executable = [text for attributes, text in found.scripts if "type" not in attributes]
    assert len(executable) == 1
    assert "alert" not in executable[0]
    assert not found.attributes("img")
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert "onerror=alert(2)" in found.texts["strays"]  # as text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b\ud800-\udfff]", source)
    for attributes, text in found.scripts:
        if attributes.get("type") == "application/json":
            json.loads(text)
            assert "<" not in text


def test_the_page_needs_nothing_else_and_allows_nothing_else(shown: Page) -> None:
    (policy,) = [found["content"] or "" for found in shown.attributes("meta") if "http-equiv" in found]
    (script,) = [text for found, text in shown.scripts if "type" not in found]
    digests = [hashlib.sha256(text.encode()).digest() for text in (script, shown.style)]
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    assert policy.split("; ") == [
        "default-src 'none'",
        f"style-src {hashes[1]}",
        f"script-src {hashes[0]}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    for tag, found in shown.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert "src" not in found
        assert "style" not in found  # the policy forbids it
        assert not (found.get("href") or "#").strip("#").startswith(("http", "//", "javascript"))
    assert "http" not in shown.style
    assert re.findall(r"url\(([^)]*)\)", shown.style) == ["#stripes"]


def test_the_page_is_accessible(shown: Page) -> None:
    assert ("html", {"lang": "en"}) in shown.tags
    ids = [found["id"] for _, found in shown.tags if "id" in found]
    assert len(ids) == len(set(ids))
    for found in (*shown.attributes("th"),):
        assert found.get("scope") in ("row", "col")
    assert all(shown.captions)
    (label,) = shown.attributes("label")
    (field,) = shown.attributes("input")
    assert label["for"] == field["id"]
    (drawing,) = [found for found in shown.attributes("svg") if found.get("role") == "img"]
    assert "GPU 0 at most 107.0 MiB" in (drawing["aria-label"] or "")
    links = [found["href"] for found in shown.attributes("a")]
    assert all((link or "").removeprefix("#") in ids for link in links)
    # A verdict is a word in each cell, not only a colour.
    words = {shown_class: verdict for verdict, shown_class in CLASSES.items()}
    named = [(words[name], text) for name, text in shown.cells if name in words]
    assert len(named) == 6
    assert all(text.startswith(verdict) for verdict, text in named)
    assert all(meaning in shown.texts["matrix"] for meaning in VERDICTS.values())


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_has_contrast_in_light_and_in_dark(shown: Page) -> None:
    light, dark = shown.style.split("prefers-color-scheme: dark", 1)
    for theme in (light, dark.split("* {", 1)[0]):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme))
        for name, ground in (
            ("ink", "ground"),
            ("ink", "raised"),
            ("soft", "ground"),
            ("soft", "raised"),
            ("link", "ground"),
        ):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        for verdict in ("own", "stray", "ctx", "allowed", "unknown"):
            assert contrast(colours[f"{verdict}-ink"], colours[verdict]) >= 4.5, verdict
        for layer in ("own-1", "own-2", "stray-1", "allowed-1", "unknown-1"):
            assert contrast(colours[layer], colours["ground"]) >= 1.5, layer


def test_a_run_without_samples_says_how_to_get_them(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cuda:1", ["cuda:0", "cuda:1"])
    log.end(2.0)
    found = render(tmp_path)
    assert "1 of 1 process put 1 context on GPUs that are not theirs; no strays." in found.texts[""]
    assert "devguard run --log DIR --record" in found.texts["unseen"]
    assert not [each for each in found.attributes("svg") if each.get("role") == "img"]
    assert found.table("process")[1][4:] == ["ctx", "own"]


def test_a_run_that_used_no_gpu_has_no_matrix(tmp_path: Path) -> None:
    Log(tmp_path, 1).state(1.0, "cpu", [])
    found = render(tmp_path)
    assert "No process held anything on a GPU." in found.texts["matrix"]
    assert "✓ None of 1 process was seen on a GPU that is not its own; no strays." in found.texts[""]
    assert [text for attributes, text in found.scripts if "type" in attributes] == []


def test_without_matplotlib_all_but_the_drawing_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = render(make_run(tmp_path))
    assert "pip install 'torch-devguard[report]'" in found.texts["memory"]
    assert found.table("GPU")[1][0] == "GPU 0"


def test_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    before = make_run(tmp_path / "before")
    after = tmp_path / "after"
    after.mkdir()
    log = Log(after, 1)
    log.state(1.0, "cuda:1", ["cuda:1"])
    log.sample(2.0, {"cuda:1": 50 * MIB})
    log.stray(3.0)
    log.end(4.0)
    found = Page(page.render([("Before", read(before)), ("After", read(after))]))
    numbers = {row[0]: row[1:] for row in found.table("")}
    assert numbers == {
        "": ["Before", "After"],
        "processes": ["4", "1"],
        "processes on GPUs of others": ["2", "0"],
        "contexts there": ["2", "0"],
        "bytes there at the worst moment": ["7.0 MiB", "0 B"],
        "strays": ["8", "1"],
        "lines that strayed": ["1", "1"],
        "observed": ["3", "0"],
        "repaired": ["5", "1"],
        "most on GPU 0": ["107.0 MiB", "not known"],
        "most on GPU 1": ["210.0 MiB", "50.0 MiB"],
        "most on GPU 2": ["300.0 MiB", "not known"],
        "most on GPU 3": ["400.0 MiB", "not known"],
    }
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(found.attributes("input")) == 2
    # The scales of both drawings are the same.
    drawings = [each["viewbox"] for each in found.attributes("svg") if each.get("role") == "img"]
    assert len(drawings) == 2


def test_hours_of_samples_of_64_processes_fit(tmp_path: Path) -> None:
    for pid in range(64):
        own = f"cuda:{pid % 8}"
        log = Log(tmp_path, 1000 + pid, pid / 100, RANK=str(pid))
        gpus = {f"cuda:{index}": f"uuid-{index}" for index in range(8)}
        log.state(1.0, own, ["cuda:0", own], gpus=gpus)
        lines = []
        for number in range(60):
            time = 1_750_000_002.0 + number * 180 + pid / 10
            own_held, astray = (number * 7919 + pid * 104729) % 60_000 * MIB, (number * 31 + pid * 17) % 300 * MIB + 1
            memory = {"cuda:0": [astray] * 3, own: [own_held] * 3}
            lines.append(json.dumps({"now": {"memory": memory, "strays": number}, "time": time}))
        log.write("\n".join(lines))
        for number in range(12):
            log.stray(5.0, bytes=number, site={"file": f"/srv/some/folder/{number}.py", "line": pid, "function": "f"})
        log.end(3 * 3600.0)
    run = read(tmp_path)
    source = page.render([("", run)])
    assert 100_000 < len(source.encode()) <= page.MOST_BYTES
    found = Page(source)
    assert len(found.table("process")) == 66  # all rows, whatever else is left out
    cells = [cell for track in run.tracks for cell in track.cells(run.history.worst.time).values()]
    assert run.history.worst.bytes == sum(cell.bytes or 0 for cell in cells if cell.verdict == "STRAY")
    assert "moments: of equal parts of the time the worst one." in found.texts["matrix"]
    lines = len(found.table("line")) - 1
    assert f"Not shown, so that the page stays small: {64 * 12 - lines} more lines." in found.texts["strays"]


def test_limits_shrink_to_an_end() -> None:
    limits, steps = Limits(), 0
    while limits.smaller() != limits:
        limits, steps = limits.smaller(), steps + 1
    assert steps < 20
    assert min(vars(limits).values()) >= 2
