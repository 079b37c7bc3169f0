"""A log as text; tests/cli/test_log.py shows what the command prints."""

from __future__ import annotations

from devguard.logs.summary import Summary
from devguard.logs.text import format_text
from tests.helpers.logs import EVIL, ROOT, judged, process, site, summary


def text(found: Summary) -> str:
    return "\n".join(format_text(found))


def test_placed_and_kept_records_are_shown_and_not_counted() -> None:
    found = text(summary(site(), site(action="kept", count=5), site(action="placed", count=2)))
    assert found.startswith(
        "1 process(es), 1 stray(s) at 1 call site(s), 1.0 MiB\n"
        "not counted as strays: 5 kept, 2 placed at 2 call site(s)\n"
    )
    assert found.index("[observed]") < found.index("5 x  load: cuda:0 [kept]")
    assert "2 x  load: cuda:0 [placed]" in found


def test_the_gate_ends_with_the_lines_that_fail() -> None:
    found = text(judged(site(), site(action="kept"), site(50, function="send", count=3)))
    assert found.endswith(
        "\n\nfails: 2 call sites with strays (fails on: repaired, refused, observed, warned)\n"
        "  serve.py:43 in receive: load: cuda:0 [observed] 1 x\n"
        "  serve.py:50 in send: load: cuda:0 [observed] 3 x"
    )
    assert text(judged(site(action="kept"))).endswith(
        "\n\npasses: no call site with strays (fails on: repaired, refused, observed, warned)"
    )


def test_with_a_baseline_only_what_is_new_is_shown_and_what_vanished_is_named() -> None:
    known = [site(), site(1, function="gone"), site(2, function="gone"), site(7, function="lost"), site(8, door="ipc")]
    found = text(
        judged(site(44), site(90, function="send"), site(3, function="gone"), site(8, door="ipc"), known=known)
    )
    assert "serve.py:44" not in found
    assert f"at {ROOT}/serve.py:90 in send" in found
    assert found.endswith(
        "\nfails: 1 new call site with strays, besides 3 known ones in base.json (fails on: repaired, refused, "
        "observed, warned)\n"
        "  serve.py:90 in send: load: cuda:0 [observed] 1 x\n"
        "vanished (1 of 2 lines left): load [observed], owner cuda, at serve.py:1,2 in gone\n"
        "vanished: load [observed], owner cuda, at serve.py:7 in lost"
    )
    passes = text(judged(site(44), known=[site()]))
    assert "\npasses: no new call site with strays, besides 1 known one in base.json" in passes


def test_a_process_that_died_is_shown_with_owner_contexts_and_end() -> None:
    killed = process(8, ended=False, end="killed", signal="SIGKILL", rank="3", contexts=["cuda:0", "cuda:1"])
    found = text(summary(site(), processes=[process(7), killed]))
    assert found.endswith(
        "\n\npid 8 on node7, rank 3: killed by SIGKILL; owned cuda:1, contexts cuda:0, cuda:1\n    serve"
    )
    assert "pid 7 on" not in found


def test_whatever_a_log_holds_the_text_is_printable() -> None:
    evil = site(door=EVIL, action=EVIL, file=EVIL, function=EVIL, devices=[EVIL], owners=[EVIL], via=EVIL, note=EVIL)
    died = process(8, end="killed", signal=EVIL, host=EVIL, command=EVIL, owner=EVIL, contexts=[EVIL], rank=EVIL)
    found = judged(evil, known=[site(function=EVIL)], processes=[died, process(alerts=[EVIL])], damaged=[EVIL])
    assert text(found).replace("\n", "").isprintable()
    assert len(text(found).splitlines()) == text(found).count("\n") + 1
