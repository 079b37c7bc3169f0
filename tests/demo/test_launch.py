"""The choice of GPUs, and passes that fail."""

from __future__ import annotations

import os

import pytest

from devguard.demo import DemoError, launch
from devguard.errors import ConfigError


@pytest.mark.parametrize("ranks", [-1, 0, 1, 17])
def test_a_number_of_ranks_out_of_range_is_refused(ranks):
    with pytest.raises(ConfigError, match=rf"--ranks {ranks} is out of range\. Valid: 2 to 16"):
        launch.choose("auto", ranks, None)


def test_a_torch_version_is_refused_for_real_gpus():
    with pytest.raises(ConfigError, match="--torch selects the version for simulated GPUs"):
        launch.choose("real", 2, "2.13.0")


@pytest.mark.parametrize(
    ("real", "backend", "ranks", "torch", "expected"),
    [
        (0, "auto", None, None, ("simulated", 4)),
        (1, "auto", None, None, ("simulated", 4)),
        (2, "auto", None, None, ("real", 2)),
        (3, "auto", 3, None, ("real", 3)),
        (8, "auto", None, None, ("real", 4)),
        (2, "auto", 4, None, ("simulated", 4)),
        (8, "auto", 2, "2.13.0", ("simulated", 2)),
        (8, "simulated", 8, None, ("simulated", 8)),
        (2, "real", None, None, ("real", 2)),
    ],
)
def test_real_gpus_are_chosen_if_there_are_enough(monkeypatch, real, backend, ranks, torch, expected):
    monkeypatch.setattr(launch, "count_real", lambda environ: real)
    monkeypatch.setattr(launch, "_count_with_torch", lambda environ: real)
    stage = launch.choose(backend, ranks, torch)
    assert (stage.backend, stage.ranks) == expected


@pytest.mark.parametrize(("real", "ranks"), [(0, None), (1, None), (2, 4)])
def test_too_few_real_gpus_are_an_error_with_the_number_found(monkeypatch, real, ranks):
    monkeypatch.setattr(launch, "_count_with_torch", lambda environ: real)
    with pytest.raises(ConfigError, match=rf"torch sees {real} GPU\(s\) here"):
        launch.choose("real", ranks, None)


def test_the_passes_do_not_inherit_the_variables_of_the_callers_guard_or_launcher():
    kept = launch.clean({"DEVGUARD": "off", "LOCAL_RANK": "3", "RANK": "3", "DEVGUARD_SIM_GPUS": "2", "HOME": "/h"})
    kept.pop("PYTHONPATH", None)
    assert kept == {"DEVGUARD_SIM_GPUS": "2", "HOME": "/h"}


def task(folder, **changes):
    return {"guarded": False, "ranks": 2, "images": [], "folder": str(folder), "state": None, **changes}


def without_gpus():
    return {**launch.clean(os.environ), "CUDA_VISIBLE_DEVICES": ""}


def test_a_rank_that_cannot_start_fails_the_pass_with_the_reason(tmp_path):
    stages = []
    with pytest.raises(DemoError, match=r"rank \d failed|the tokenizer process failed"):
        launch.run_pass(task(tmp_path), without_gpus(), stages.append)
    assert stages[0] == "start the ranks"


def test_a_pass_that_dies_is_an_error_with_its_last_output(tmp_path):
    (tmp_path / "devguard").mkdir()
    (tmp_path / "devguard" / "__init__.py").write_text("raise SystemExit('out of order')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    with pytest.raises(DemoError, match=r"ended with status 1\. Its last output:\n  out of order"):
        launch.run_pass(task(tmp_path), environment, lambda text: None)


def test_a_pass_that_takes_too_long_is_stopped(tmp_path):
    with pytest.raises(DemoError, match="took longer than 0 s"):
        launch.run_pass(task(tmp_path), without_gpus(), lambda text: None, limit=0)
