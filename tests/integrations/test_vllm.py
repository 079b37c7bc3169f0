"""vLLM's plugin contract: vLLM calls the entry point in every process, and each worker owns the device that it chose.

The package in tests/integrations/standin stands in for vLLM and follows the contract in vLLM's source; no server runs.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from devguard.cli.selfcheck import tagged_pickle
from devguard.integrations import vllm

HERE = Path(__file__).parent


def run(run_simulated: Any, sim_environment: Any, folder: Path, **environ: str) -> Any:
    (folder / "message").write_bytes(tagged_pickle("cuda:0"))
    base = {name: value for name, value in os.environ.items() if not name.startswith(("DEVGUARD", "VLLM"))}
    base["PYTHONPATH"] = os.pathsep.join([str(HERE / "standin"), base.get("PYTHONPATH", "")])
    env = sim_environment(3, base=base) | environ
    return run_simulated([HERE / "vllm_program.py", folder / "message"], env=env).result


def test_the_entry_point_takes_no_arguments_and_does_nothing_unless_requested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DEVGUARD", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(vllm, "arm", lambda: pytest.fail("the environment does not request it"))
    (found,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "devguard"]
    found.load()()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    found.load()()
    monkeypatch.setenv("VLLM_PLUGINS", "devguard")
    monkeypatch.setenv("DEVGUARD", "off")
    found.load()()


def test_each_worker_owns_the_device_that_it_chose(run_simulated: Any, sim_environment: Any, tmp_path: Path) -> None:
    found = run(run_simulated, sim_environment, tmp_path, DEVGUARD="repair")
    assert found == [
        ["cuda:1", ["cuda:1"], "vLLM worker 0", "repair"],
        ["cuda:2", ["cuda:2"], "vLLM worker 1", "repair"],
        ["cuda:0", ["cuda:0", "cuda:1"], "environment", "observe"],  # A worker in the user's own process.
    ]


def test_a_plugin_named_in_vllm_plugins_needs_no_devguard_variable(
    run_simulated: Any, sim_environment: Any, tmp_path: Path
) -> None:
    found = run(run_simulated, sim_environment, tmp_path, VLLM_PLUGINS="devguard")
    assert [row[:3] for row in found[:2]] == [
        ["cuda:1", ["cuda:1"], "vLLM worker 0"],
        ["cuda:2", ["cuda:2"], "vLLM worker 1"],
    ]
    assert found[2][0] == "cuda:0"


def test_a_vllm_version_without_init_device_causes_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(vllm.HOMES[0])
    module.WorkerWrapperBase = type("WorkerWrapperBase", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.warns(RuntimeWarning, match=r"vLLM's workers: this version has no WorkerWrapperBase\.init_device"):
        vllm.arm()
    assert vllm.disarm() == []
