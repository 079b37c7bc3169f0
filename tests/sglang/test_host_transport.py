"""``DEVGUARD_TRANSPORT=host``: SGLang's own class and tokenizer, with an arena and with SGLang's segments."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from devguard.activation import environment
from devguard.errors import ConfigError
from devguard.integrations import sglang
from devguard.integrations.sglang import host_transport, request_leases, shm_pointer, transport_conditions, versions
from devguard.integrations.sglang.request_leases import Requests, Sender
from devguard.transport import Handle
from tests.helpers.simulated import Finished, run_simulated
from tests.sglang.environment import OLDEST, POSSIBLE, sglang_environment

needs_sglang = [
    pytest.mark.skipif(not POSSIBLE, reason="SGLang 0.5.23 needs Python 3.11"),
    pytest.mark.timeout(600),  # The first test installs SGLang.
]

BUDGET = 4 << 20
EMPTY = {"in_use": 0, "leases": 0}


def crew(folder: Path, *cases: str, **variables: str) -> Finished:
    environ = sglang_environment(2, folder=folder) | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"} | variables
    return run_simulated(["-m", "tests.sglang.pointer_crew", *cases], env=environ, timeout=400)


@pytest.fixture(scope="module")
def by_arena(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("sglang")
    return crew(folder, DEVGUARD_TRANSPORT="host", DEVGUARD_TRANSPORT_BUDGET="4MiB")


@pytest.fixture(scope="module")
def by_segment(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """SGLang as it is, guarded: the transport is not asked for."""
    folder = tmp_path_factory.mktemp("sglang")
    cases = ("equal_on_every_rank", "killed_rank", "without_a_request")
    return crew(folder, *cases, DEVGUARD="repair", SGLANG_PLUGINS="none")


def is_empty(usage: dict[str, int]) -> bool:
    return EMPTY.items() <= usage.items()


class TestRealClass:
    """SGLang 0.5.23's class, tokenizer and serializers, in the processes of pointer_crew.py."""

    pytestmark = needs_sglang

    def test_nothing_is_patched_that_is_not_asked_for(self, by_arena: Finished, by_segment: Finished) -> None:
        assert by_segment.result["patched"] == []
        assert by_segment.result["status"] is None
        assert by_arena.result["patched"] == [
            "__init__", "__setstate__", "materialize", "close_and_unlink", "init_running_status", "_send_one_request",
        ]  # fmt: skip

    def test_every_rank_gets_equal_tensors_after_the_hops_of_a_router(
        self, by_arena: Finished, by_segment: Finished
    ) -> None:
        for done, name in ((by_arena, "arena"), (by_segment, "segment")):
            found = done.result["equal_on_every_rank"]
            assert found["equal"] == [True, True]
            assert found["names"] == [name]
            assert found["hash"] == [7, 7]
            assert found["connections of the router"] == 0
        found = by_arena.result["equal_on_every_rank"]
        assert found["held"]
        assert found["length"] < 400
        assert is_empty(found["after"])
        assert (found["after"]["puts"], found["after"]["fallbacks"]) == (10, 0)

    def test_a_rank_that_writes_to_its_tensor_changes_no_other(self, by_arena: Finished) -> None:
        found = by_arena.result["writes_stay_local"]
        assert found["unchanged"]
        assert is_empty(found["after"])

    def test_n_samples_are_n_plus_one_puts(self, by_arena: Finished) -> None:
        found = by_arena.result["parallel_samples"]
        assert found["equal"]
        assert found["leases"]["leases"] == 4
        assert is_empty(found["ended"])

    def test_a_forgotten_request_ends_its_leases_whichever_way_it_is_forgotten(self, by_arena: Finished) -> None:
        found = by_arena.result["forgotten_requests"]
        assert set(found) == {"del", "pop", "pop with default", "clear"}
        for before, after in found.values():
            assert before == 2
            assert is_empty(after)

    def test_a_rank_keeps_the_tensor_of_a_forgotten_request_and_a_late_one_is_refused(self, by_arena: Finished) -> None:
        found = by_arena.result["forgotten_while_read"]
        assert (found["late"], found["held"]) == ("HandleReleased", 1)
        assert is_empty(found["after"])

    @pytest.mark.parametrize("case", ["discarded", "not_dispatched"])
    def test_a_failed_request_ends_its_lease(self, by_arena: Finished, case: str) -> None:
        assert is_empty(by_arena.result[case])

    def test_a_full_budget_falls_back_to_sglangs_segment_without_waiting(self, by_arena: Finished) -> None:
        found = by_arena.result["full_budget"]
        assert found["names"] == ["arena", "segment", "segment", "segment"]
        assert (found["segments"], found["fallbacks"], found["left"]) == (3, 3, 0)
        assert found["equal"]
        assert found["seconds"] < 5
        assert is_empty(found["after"])
        assert by_arena.stderr.count("travels in a segment of SGLang: BudgetFull") == 1
        assert "DEVGUARD_TRANSPORT_BUDGET" in by_arena.stderr

    def test_a_killed_rank_leaves_nothing_where_sglang_leaves_a_segment(
        self, by_arena: Finished, by_segment: Finished
    ) -> None:
        assert by_segment.result["killed_rank"]["left"] > 0
        assert by_arena.result["killed_rank"]["left"] == 0
        assert is_empty(by_arena.result["killed_rank"]["after"])

    def test_an_object_that_no_request_sends_is_sglangs(self, by_arena: Finished) -> None:
        assert by_arena.result["without_a_request"] == "segment"

    def test_uninstall_restores_everything_and_keeps_what_is_in_flight(self, by_arena: Finished) -> None:
        assert by_arena.result["uninstalled"] == {
            "left": [], "read": 1, "sent": ["segment"], "patched": [], "usage": None,
        }  # fmt: skip
        assert by_arena.result["status"] is None

    def test_a_release_without_the_class_is_an_error_that_says_so(self, tmp_path: Path) -> None:
        program = """
            import json, sys, types
            from tests.sglang import older
            kernels = types.ModuleType("vllm._custom_ops")
            kernels.scaled_fp8_quant = print  # which SGLang imports, and does not call here
            sys.modules.update({"vllm": types.ModuleType("vllm"), kernels.__name__: kernels})
            import devguard, torch
            from sglang.srt.managers import mm_utils
            from devguard.integrations.sglang import guarded_engine
            class Engine:
                run_scheduler_process_func = staticmethod(print)
            try:
                guarded_engine(Engine, transport="host")
            except devguard.ConfigError as error:
                print(json.dumps([str(error), devguard.status()["transport"]]))
        """
        environ = sglang_environment(2, release=OLDEST, folder=tmp_path) | {"DEVGUARD_TRANSPORT": "host"}
        done = run_simulated(program, env=environ)
        why = f"SGLang {OLDEST} is too old: it has no ShmPointerMMData. Use 0.5.23, or unset DEVGUARD_TRANSPORT."
        assert done.result == [f'transport="host": {why}', None]
        assert done.stderr.count(f"tensors travel as SGLang sends them: {why}") == 1


# ---- without SGLang


def test_a_name_holds_a_handle_of_each_kind() -> None:
    for data, readers in ((None, 2), (b"\0\xff", ("tp0", "tp1"))):
        handle = Handle("address", 1, readers, 2, 3, 4096, 5, data, "file.py:6")
        found = shm_pointer.decode(shm_pointer.encode(handle))
        assert [getattr(found, name) for name in ("address", "number", "slot", "segment", "offset", "nbytes")] == [
            "address", 1, 2, 3, 4096, 5,
        ]  # fmt: skip
        assert (found.data, found.site, tuple(found.readers) if data else found.readers) == (
            data,
            "file.py:6",
            readers,
        )


def parallel(**values: Any) -> types.SimpleNamespace:
    defaults = {"nnodes": 1, "tp_size": 1, "attn_dp_enabled": False, "attn_tp_size": 1, "attn_cp_size": 1}
    return types.SimpleNamespace(**defaults | values)


@pytest.mark.parametrize(
    ("values", "readers"),
    [
        ({}, 1),
        ({"tp_size": 4}, 4),
        ({"tp_size": 2, "dp_size": 4}, 2),  # one replica reads
        ({"tp_size": 4, "pp_size": 2}, 4),  # the first stage reads
        ({"tp_size": 4, "attn_cp_size": 2, "attn_tp_size": 2}, 4),
        ({"tp_size": 8, "attn_dp_enabled": True, "attn_tp_size": 2}, 2),  # one group reads
        ({"tp_size": 8, "attn_dp_enabled": True, "attn_tp_size": 2, "attn_cp_size": 2}, 4),
    ],
)
def test_as_many_ranks_read_as_receive_the_broadcast(values: dict[str, Any], readers: int) -> None:
    assert transport_conditions.count_readers(parallel(**values)) == readers


def context(**values: Any) -> Any:
    serving = types.SimpleNamespace(skip_tokenizer_init=values.pop("skip_tokenizer_init", False))
    names = ("language_only", "encoder_only")
    disaggregation = types.SimpleNamespace(**{name: values.pop(name, False) for name in names})
    return types.SimpleNamespace(
        get_parallel=lambda: parallel(**values), get_disagg=lambda: disaggregation, get_serving=lambda: serving
    )


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({}, ""),
        ({"nnodes": 2}, "2 nodes"),
        ({"language_only": True}, "EPD"),
        ({"encoder_only": True}, "EPD"),
        ({"skip_tokenizer_init": True}, "--skip-tokenizer-init"),
        ({"max_ep_size": 8}, "elastic"),
    ],
)
def test_it_is_off_where_it_cannot_work_and_says_why(values: dict[str, Any], why: str) -> None:
    found = transport_conditions.find_exception(context(**values))
    assert why in found if why else not found


def test_the_rust_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.5.23")
    module: Any = types.SimpleNamespace(ShmPointerMMData=type("ShmPointerMMData", (), dict.fromkeys(METHODS, print)))
    assert transport_conditions.find_problem(module) == ""
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    assert "SGLANG_RUST_SERVER" in transport_conditions.find_problem(module)


METHODS = ("__getstate__", "__setstate__", "materialize", "close_and_unlink", "__init__")


def test_a_class_of_another_shape_is_refused_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.5.10")
    module: Any = types.SimpleNamespace(ShmPointerMMData=type("ShmPointerMMData", (), {"materialize": None}))
    found = transport_conditions.find_problem(module)
    assert found.startswith("SGLang 0.5.10 is too old: its ShmPointerMMData has no __init__, __getstate__")
    assert "close_and_unlink" in found


@pytest.mark.parametrize(
    ("environ", "version", "text", "problem"),
    [
        ({}, "0.5.23", "", ""),
        ({"DEVGUARD_TRANSPORT": "off"}, "0.5.23", "", ""),
        ({"DEVGUARD_TRANSPORT": "host"}, "0.5.23", "budget 1,073,741,824 bytes", ""),
        ({"DEVGUARD_TRANSPORT": "host", "DEVGUARD_TRANSPORT_BUDGET": "64M"}, "0.5.23", "budget 67,108,864 bytes", ""),
        ({"DEVGUARD_TRANSPORT": "host", "DEVGUARD_TRANSPORT_BUDGET": "1"}, "0.5.23", "", ""),  # reported as a setting
        ({"DEVGUARD_TRANSPORT": "host"}, None, "", "SGLang is not installed"),
        ({"DEVGUARD_TRANSPORT": "host", "DEVGUARD": "off"}, "0.5.23", "", "no effect with DEVGUARD=off"),
        ({"DEVGUARD_TRANSPORT": "host", "SGLANG_RUST_SERVER": "true"}, "0.5.23", "", "SGLANG_RUST_SERVER"),
    ],
)
def test_the_doctor_says_whether_it_is_on(
    environ: dict[str, str], version: str | None, text: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_conditions, "_reads_as_known", lambda: "")
    found = transport_conditions.examine(version, environ)
    assert text in found[0]
    assert bool(text) == bool(found[0])
    assert problem in found[1]
    assert bool(problem) == bool(found[1])


def test_the_doctor_finds_the_class_in_the_source_and_imports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sglang" / "srt" / "managers").mkdir(parents=True)
    (tmp_path / "sglang" / "__init__.py").write_text("raise SystemExit('imported')")
    source = tmp_path / "sglang" / "srt" / "managers" / "mm_utils.py"
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    asked = {"DEVGUARD_TRANSPORT": "host"}
    for text, problem in (
        ("", "it has no ShmPointerMMData"),
        ("class ShmPointerMMData:\n", "its ShmPointerMMData has no close_and_unlink"),
    ):
        source.write_text(text)
        assert problem in transport_conditions.examine("0.4.6", asked)[1]
    source.write_text("class ShmPointerMMData:\n    def close_and_unlink(self): ...\n")
    assert transport_conditions.examine("0.5.23", asked)[1] == ""


def test_an_unknown_transport_of_an_engine_is_an_error_with_the_valid_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.5.23")
    with pytest.raises(ConfigError, match=r"transport='cuda' is not a transport\. Valid: host, off, 0\."):
        sglang.guarded_engine(type("Engine", (), {"run_scheduler_process_func": staticmethod(print)}), transport="cuda")


def test_an_engine_sends_through_an_arena_and_its_entry_points_carry_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    armed: list[tuple[int, bool]] = []
    monkeypatch.setattr(versions, "installed", lambda: "0.5.23")
    monkeypatch.setattr(host_transport, "require", lambda: None)
    monkeypatch.setattr(host_transport, "arm", lambda budget, *, everywhere: armed.append((budget, everywhere)))
    monkeypatch.setenv("DEVGUARD_TRANSPORT_BUDGET", "2MiB")

    class Engine:
        run_scheduler_process_func = staticmethod(plain_entry)

        def __init__(self) -> None:
            self.requested = host_transport._requested.get()

    guarded: Any = sglang.guarded_engine(Engine, transport="host")
    assert guarded().requested
    assert not Engine().requested
    function, arguments = guarded.run_scheduler_process_func.__reduce__()
    function(*arguments)
    assert armed == [(2 << 20, False)] * 2
    assert sglang.guarded_engine(Engine)().requested is False


def plain_entry(server_args: Any, gpu_id: Any) -> None: ...


def test_a_sender_that_cannot_put_falls_back_and_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    sender = Sender(environment.DEFAULT_BUDGET)
    monkeypatch.setattr(sender, "_arena_of_process", lambda: 1 / 0)
    requests = Requests({"one": None}, sender, 2)
    assert requests.put("one", None) is None
    assert requests.put("two", None) is None
    assert (sender.puts, sender.fallbacks) == (0, 1)
    assert request_leases.put(None) is None


def test_a_class_that_is_still_being_imported_is_not_judged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The module's own imports may import torch first, and so arm the transport."""
    begun = types.ModuleType(shm_pointer.MODULE)
    begun.__spec__ = importlib.machinery.ModuleSpec(shm_pointer.MODULE, None)
    begun.__spec__._initializing = True  # type: ignore[attr-defined]
    monkeypatch.setattr(versions, "installed", lambda: "0.5.23")
    monkeypatch.setitem(sys.modules, shm_pointer.MODULE, begun)
    monkeypatch.delitem(sys.modules, host_transport.TOKENIZER, raising=False)
    host_transport.arm(1 << 20, everywhere=True)
    try:
        assert "OFF" not in capsys.readouterr().err
        original = {name: (lambda self: None) for name in METHODS}
        kind = begun.ShmPointerMMData = type("ShmPointerMMData", (), original)  # type: ignore[attr-defined]
        host_transport._patch_imported_pointer(types.ModuleType(host_transport.SCHEDULER))
        assert host_transport.in_force()
        assert vars(kind)["materialize"] is not original["materialize"]
    finally:
        assert host_transport.disarm() == []
    assert vars(kind)["materialize"] is original["materialize"]
    assert not host_transport.in_force()


def test_the_table_of_requests_is_a_dictionary() -> None:
    requests = Requests({"a": 1}, Sender(1 << 16), 2)
    requests.update(b=2)
    assert requests == {"a": 1, "b": 2}
    with pytest.raises(KeyError):
        del requests["c"]
    with pytest.raises(KeyError):
        requests.pop("c")
    assert (requests.pop("c", 3), requests.popitem(), requests.pop("a"), len(requests)) == (3, ("b", 2), 1, 0)
