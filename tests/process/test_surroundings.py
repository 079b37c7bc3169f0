"""The same checks in all surroundings: options of Python, event loops, green threads, and tracers.

One process for each surrounding runs all `CHECKS` of tests/helpers/surrounded.py, and another one is a rank that does
not use devguard. Both have to end by themselves, and may print nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import tagging
from tests.helpers.simulated import Finished
from tests.helpers.surrounded import CHECKS
from tests.helpers.surroundings import SURROUNDINGS

Run = Callable[[str, str], tuple[Finished, Any]]


@pytest.fixture(scope="module")
def run(run_simulated: Any, sim_environment: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return ``run(surrounding, module)``, which runs each program once: its end, and what it has written."""

    @functools.cache
    def run_once(name: str, module: str) -> tuple[Finished, Any]:
        folder = tmp_path_factory.mktemp("surroundings")
        value = torch.arange(4.0)
        (folder / "message").write_bytes(tagging.dumps(value, "cuda:0"))
        (folder / "zip").write_bytes(tagging.save(value, "cuda:0"))
        (folder / "legacy").write_bytes(tagging.save(value, "cuda:0", legacy=True))
        environment = sim_environment(4)
        if module.endswith("rank"):
            environment |= {"DEVGUARD": "repair", "DEVGUARD_STRICT": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
        words = ["-m", "tests.helpers.surroundings", name, module, folder, folder / "results"]
        done = run_simulated([*SURROUNDINGS[name].options, *words], env=environment, timeout=120)
        return done, json.loads(Path(folder, "results").read_text())

    return run_once


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_program_with_guards(run: Run, name: str, check: str) -> None:
    _, results = run(name, "tests.helpers.surrounded")
    assert results[check] is None, results[check]


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_program_that_does_not_use_devguard(run: Run, name: str) -> None:
    done, results = run(name, "tests.helpers.surrounded_rank")
    assert results.pop("contexts") == [1]
    own = ["cuda:1"] * 3
    assert results == {"child": own, "main": own, "thread": own, "pool": own, "task": own, "worker": own}
    assert not done.me.devices[0].context


@pytest.mark.parametrize("module", ["tests.helpers.surrounded", "tests.helpers.surrounded_rank"])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_nothing_is_printed_and_the_program_ends(run: Run, name: str, module: str) -> None:
    done, _ = run(name, module)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
