"""The integration without SGLang: stand-in modules under SGLang's names, in child processes on simulated GPUs."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
import textwrap
import types
from typing import Any

import pytest

import devguard
from devguard.errors import ConfigError, DeviceResolutionError
from devguard.integrations import sglang
from devguard.integrations.sglang import bugs, entry, roles, versions
from tests.helpers.simulated import run_simulated

# 0.4.6.post2 passes the GPU to Scheduler; later releases to configure_scheduler_process, at changing positions.
STAND_IN = """
    import importlib.metadata, sys, types
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: {version!r} if name == "sglang" else version(name)
    def module(name, **names):
        made = sys.modules[name] = types.ModuleType(name)
        for key, value in names.items():
            setattr(made, key, value)
        return made
    import devguard, torch
"""


def run(code: str, version: str = "0.5.23") -> str:
    program = textwrap.dedent(STAND_IN).replace("{version!r}", repr(version)) + textwrap.dedent(code)
    return run_simulated(program, gpus=2).stdout.strip()


@pytest.mark.parametrize("order", ["server_args, gpu_id, tp_rank=0", "tp_rank, server_args, gpu_id"])
def test_a_scheduler_owns_its_gpu_at_any_position_of_the_argument(order: str) -> None:
    printed = run(f"""
        def configure_scheduler_process({order}):
            print(devguard.status()["process_owner"])
        scheduler = module("sglang.srt.managers.scheduler", configure_scheduler_process=configure_scheduler_process)
        before = scheduler.configure_scheduler_process
        devguard.integrations.arm()
        devguard.integrations.arm()
        assert scheduler.configure_scheduler_process is not before
        scheduler.configure_scheduler_process(server_args=None, tp_rank=1, gpu_id=1)
        assert devguard.uninstall() == []
        assert scheduler.configure_scheduler_process is before
    """)
    assert printed == "cuda:1"


def test_an_owner_that_the_program_installed_stays_in_force() -> None:
    printed = run("""
        own = lambda server_args, gpu_id: None
        scheduler = module("sglang.srt.managers.scheduler", configure_scheduler_process=own)
        devguard.integrations.arm()
        devguard.install(device="cuda:0")
        scheduler.configure_scheduler_process(None, 1)
        print(devguard.status()["process_owner"])
    """)
    assert printed == "cuda:0"


def test_a_missing_gpu_is_logged_and_the_server_still_starts() -> None:
    printed = run("""
        import logging
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        scheduler = module("sglang.srt.managers.scheduler", configure_scheduler_process=lambda server_args, gpu_id: 7)
        devguard.integrations.arm()
        print(scheduler.configure_scheduler_process(None, 5))
    """)
    assert "this scheduler is NOT guarded" in printed
    assert printed.endswith("7")


@pytest.mark.parametrize("version", ["0.4.5.post3", "0.6.0"])
def test_an_unsupported_release_stays_unpatched_with_a_line_in_the_log(version: str) -> None:
    printed = run(
        """
        import logging
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        original = lambda server_args, gpu_id: None
        scheduler = module("sglang.srt.managers.scheduler", configure_scheduler_process=original)
        devguard.integrations.arm()
        assert scheduler.configure_scheduler_process is original
        """,
        version,
    )
    assert f"0.4.6 to 0.5.23, and this is {version}" in printed


def test_arming_imports_neither_torch_nor_sglang() -> None:
    code = "import devguard.integrations, sys; devguard.integrations.arm(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- the decorator


@sglang.worker
def run_scheduler(server_args: Any, gpu_id: Any, pipe: Any) -> None:
    pipe.put(str(devguard.owner()))


@sglang.worker(mode="error")
def run_detokenizer_process(server_args: Any, pipe: Any) -> None:
    pipe.put(str(devguard.owner()))


@pytest.mark.parametrize(("target", "arguments"), [(run_scheduler, {"gpu_id": "cpu"}), (run_detokenizer_process, {})])
def test_a_decorated_entry_point_starts_a_spawned_process(target: Any, arguments: dict[str, Any]) -> None:
    context = multiprocessing.get_context("spawn")
    pipe = context.Queue()
    process = context.Process(target=target, kwargs={"server_args": None, "pipe": pipe, **arguments})
    process.start()
    assert pipe.get(timeout=100) == "cpu"
    process.join()
    assert process.exitcode == 0


def test_a_worker_without_a_gpu_parameter_is_refused_with_the_names_looked_for() -> None:
    with pytest.raises(DeviceResolutionError, match=r"run has no parameter.*gpu_id, local_rank.*it has: rank"):

        @sglang.worker
        def run(rank: int) -> None: ...


def test_an_invalid_mode_or_target_is_refused_when_decorating() -> None:
    with pytest.raises(ConfigError, match="not a mode"):
        sglang.worker(mode="fix")(run_detokenizer_process.__wrapped__)
    with pytest.raises(ConfigError, match="decorates a function"):
        sglang.worker(3)


def test_arguments_are_found_by_name_in_keywords_too() -> None:
    def run(first: int, *rest: int, **kwargs: int) -> None: ...

    assert roles.device_argument(roles.bound(run, (1, 2), {"local_rank": 3})) == 3
    assert roles.device_argument(roles.bound(run, (1,), {})) is None


# ---- the engine


def plain_entry(server_args: Any, gpu_id: Any) -> str:
    return str(devguard.owner())


class Engine:
    run_scheduler_process_func = staticmethod(plain_entry)


def test_a_guarded_engines_entry_point_is_guarded_after_pickling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.5.23")
    armed = []
    monkeypatch.setattr(roles, "arm", lambda: armed.append(True))
    guarded = sglang.guarded_engine(Engine)
    assert issubclass(guarded, Engine)
    arrived = pickle.loads(pickle.dumps(guarded.run_scheduler_process_func))
    assert armed  # Unpickling arms the integration, before the call.
    assert isinstance(arrived, entry._Entry)
    assert arrived(None, gpu_id="cpu") == "cpu"
    assert Engine.run_scheduler_process_func is plain_entry


def test_guarded_engine_resolves_sglangs_lazy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.5.23")
    proxy: Any = types.SimpleNamespace(module_name=__name__, class_name="Engine")
    monkeypatch.setitem(sys.modules, __name__, types.SimpleNamespace(Engine=Engine))  # type: ignore[arg-type]
    assert issubclass(sglang.guarded_engine(proxy), Engine)


def test_an_engine_with_fixed_entry_points_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.4.6.post2")
    with pytest.raises(ConfigError, match="DEVGUARD=repair"):
        sglang.guarded_engine(type("Engine", (), {}))


def test_an_engine_of_an_unsupported_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.6.0")
    with pytest.raises(sglang.UnsupportedVersionError, match=r"0\.4\.6 to 0\.5\.23, and this is 0\.6\.0"):
        sglang.guarded_engine(Engine)


# ---- versions and known bugs


def test_versions_are_ordered_as_pip_orders_them() -> None:
    ordered = ["0.4.6rc1", "0.4.6", "0.4.6.post2", "0.4.6.post3", "0.4.10", "0.5", "0.5.23"]
    assert sorted(ordered, key=versions.parse) == ordered
    with pytest.raises(sglang.UnsupportedVersionError, match="unknown"):
        versions.parse("unknown")


def test_the_original_bug_ends_with_its_last_release_but_its_cause_remains() -> None:
    before, after = (sglang.known_bugs(version) for version in ("0.4.6.post2", "0.4.6.post3"))
    assert set(before) - set(after) == {bugs.BUGS[0]}
    assert bugs.BUGS[1] in after
