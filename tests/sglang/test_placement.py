"""The judgement on a server's processes: what it accepts, and what it must refuse."""

from __future__ import annotations

import dataclasses

import pytest

from tests.sglang.placement import Answer, problems, role, table
from tests.sglang.recorded import (
    ANSWERS,
    CONTEXT,
    DATA_PARALLEL,
    FREED,
    GUARDED_DP,
    GUARDED_TP,
    IMAGES,
    NOTHING,
    TENSOR_PARALLEL,
    change,
    holding,
)


def test_a_server_whose_processes_stay_on_their_gpus_is_accepted() -> None:
    assert problems(TENSOR_PARALLEL, GUARDED_TP, tp=2, dp=1) == []
    assert problems(DATA_PARALLEL, GUARDED_DP, tp=1, dp=2) == []


def test_an_unguarded_server_in_place_of_the_guarded_one_is_refused() -> None:
    found = problems(DATA_PARALLEL, DATA_PARALLEL, tp=1, dp=2)
    assert "with devguard: scheduler DP1 holds context + 2 MiB on GPU 0, not its own" in found
    assert "with devguard: DP controller holds context + 2 MiB on GPU 0, not its own" in found


@pytest.mark.parametrize("left", [CONTEXT, IMAGES, FREED])
@pytest.mark.parametrize("name", ["scheduler TP1", "detokenizer"])
def test_a_context_alone_and_freed_bytes_count_too(name: str, left: tuple[bool, int, int]) -> None:
    found = problems(TENSOR_PARALLEL, change(GUARDED_TP, name, left, IMAGES), tp=2, dp=1)
    assert any(name in one and "on GPU 0" in one for one in found)


def test_a_helper_process_may_hold_nothing() -> None:
    stray = dataclasses.replace(GUARDED_TP, holdings=(*GUARDED_TP.holdings, holding("helper", None, CONTEXT)))
    assert problems(TENSOR_PARALLEL, stray, tp=2, dp=1) == [
        "with devguard: helper holds context + 0 MiB on GPU 0, not its own"
    ]


def test_a_run_that_does_not_show_the_bug_proves_nothing() -> None:
    assert problems(GUARDED_TP, GUARDED_TP, tp=2, dp=1) == [
        "without devguard: scheduler TP1 holds nothing on GPU 0, so this run does not show the bug"
    ]


def test_a_rank_that_never_had_images_on_its_own_gpu_is_refused() -> None:
    lost = change(GUARDED_TP, "scheduler TP1", NOTHING, CONTEXT)
    assert problems(TENSOR_PARALLEL, lost, tp=2, dp=1) == [
        "with devguard: scheduler TP1 never had a byte on its own GPU 1"
    ]


def test_a_missing_process_is_refused() -> None:
    fewer = dataclasses.replace(GUARDED_TP, holdings=GUARDED_TP.holdings[:-1])
    assert problems(TENSOR_PARALLEL, fewer, tp=2, dp=1) == ["with devguard: no detokenizer was seen"]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ((Answer(200, "a cat", ()), Answer(500, "a dog", ())), ["with devguard: answers [500]"]),
        ((Answer(200, "a cat", ()), Answer(200, "a cow", ())), ["the answers differ with and without devguard"]),
        ((), ["with devguard: no answers", "the answers differ with and without devguard"]),
    ],
)
def test_wrong_answers_are_refused(answers: tuple[Answer, ...], expected: list[str]) -> None:
    assert problems(TENSOR_PARALLEL, dataclasses.replace(GUARDED_TP, answers=answers), tp=2, dp=1) == expected


def test_answers_that_do_not_depend_on_the_image_prove_nothing() -> None:
    alike = ANSWERS[:1] * 2
    both = [dataclasses.replace(one, answers=alike) for one in (TENSOR_PARALLEL, GUARDED_TP)]
    assert problems(*both, tp=2, dp=1) == ["every image had the same answer, so equal answers show nothing"]


@pytest.mark.parametrize(
    ("title", "leader", "tp", "expected"),
    [
        ("python -m sglang.launch_server --tp 2", True, 2, ("tokenizer", 0)),
        ("sglang::scheduler_TP1", False, 2, ("scheduler TP1", 1)),
        ("sglang::scheduler_DP1", False, 1, ("scheduler DP1", 1)),
        ("sglang::scheduler_DP1_TP0", False, 2, ("scheduler DP1 TP0", 2)),
        ("sglang::scheduler", False, 1, ("scheduler", 0)),
        ("sglang::data_parallel_controller", False, 1, ("DP controller", None)),
        ("sglang::detokenizer", False, 1, ("detokenizer", None)),
        ("python -c from multiprocessing.resource_tracker import main", False, 1, ("helper", None)),
    ],
)
def test_a_title_gives_role_and_owner(title: str, leader: bool, tp: int, expected: tuple[str, int | None]) -> None:
    assert role(title, leader=leader, tp=tp) == expected


def test_the_table_marks_what_is_on_a_gpu_that_the_process_does_not_own() -> None:
    rows = {line.split("  ")[0]: line for line in table(DATA_PARALLEL, GUARDED_DP, 2).splitlines()}
    assert rows["scheduler DP1"].count("!") == rows["DP controller"].count("!") == 1
    assert "!" not in rows["scheduler DP0"] + rows["tokenizer"] + rows["detokenizer"]
