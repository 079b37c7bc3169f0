"""The environment variables that ``devguard doctor`` shows and checks."""

from __future__ import annotations

import pytest

from devguard.cli import variables


def test_valid_variables_are_not_reported() -> None:
    environ = {"DEVGUARD": "repair", "DEVGUARD_DEVICE": "cuda:1", "DEVGUARD_RANK_LOCK": "off", "HOME": "/root"}
    assert variables.check_settings(environ) == []


def test_an_unknown_variable_is_reported_with_the_known_ones() -> None:
    (problem,) = variables.check_settings({"DEVGUARD_DEVICES": "cuda:1"})
    assert problem.startswith("DEVGUARD_DEVICES is not a variable")
    assert all(name in problem for name in variables.KNOWN)


def test_every_invalid_value_is_reported() -> None:
    problems = variables.check_settings({"DEVGUARD": "loud", "DEVGUARD_DOORS": "window=warn", "DEVGUARD_X": "1"})
    assert [problem.split()[0].partition("=")[0].rstrip(":") for problem in problems] == [
        "DEVGUARD",
        "DEVGUARD_DOORS",
        "DEVGUARD_X",
    ]


@pytest.mark.parametrize("name", ["DEVGUARD_SIM_GPUS", "DEVGUARD_TRACE_OUTPUT", "DEVGUARD_TEST_TORCH"])
def test_variables_that_devguard_sets_itself_are_not_reported(name: str) -> None:
    assert variables.check_settings({name: "1"}) == []


def test_the_relevant_variables_are_selected_in_order() -> None:
    environ = {"LOCAL_RANK": "1", "SLURM_NTASKS_PER_NODE": "4", "HOME": "/root", "DEVGUARD": "1", "RANK": "1"}
    assert list(variables.select_relevant(environ)) == ["DEVGUARD", "LOCAL_RANK", "RANK", "SLURM_NTASKS_PER_NODE"]


def test_a_budget_without_a_transport_is_reported() -> None:
    (problem,) = variables.check_settings({"DEVGUARD_TRANSPORT_BUDGET": "1GiB"})
    assert problem.startswith("DEVGUARD_TRANSPORT_BUDGET has no effect without DEVGUARD_TRANSPORT")
    assert variables.check_settings({"DEVGUARD_TRANSPORT_BUDGET": "1GiB", "DEVGUARD_TRANSPORT": "host"}) == []
