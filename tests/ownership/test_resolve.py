"""Whose device is this: the owner as a value, and how it is found when nobody names it."""

from __future__ import annotations

import fractions
import operator

import numpy as np
import pytest
import torch

import devguard
from devguard import ConfigError, DeviceResolutionError
from devguard.ownership.owner import CPU, owned_tags, owner_of_index, parse_owner
from devguard.ownership.resolve import LAUNCHERS, owner_from_environment
from devguard.support import accelerator
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")

RANKS = [launcher.rank for launcher in LAUNCHERS]
SIZES = [size for launcher in LAUNCHERS for size in launcher.size]


@pytest.fixture
def four_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "device_count", lambda: 4)


def found(environ: dict[str, str]) -> str | None:
    owner, _ = owner_from_environment(environ)
    return owner and owner.tag


# --- the owner as a value ---


def test_there_is_one_owner_object_for_each_device() -> None:
    assert parse_owner("cuda:1") is parse_owner(1) is parse_owner(torch.device("cuda", 1)) is owner_of_index(1)
    assert parse_owner("cpu") is parse_owner(torch.device("cpu")) is CPU
    assert parse_owner(1) is not parse_owner(2)


@pytest.mark.parametrize(
    ("device", "tag"),
    [
        (0, "cuda:0"),
        (3, "cuda:3"),
        ("cuda:1", "cuda:1"),
        ("1", "cuda:1"),
        (" CUDA:2 ", "cuda:2"),
        ("cpu", "cpu"),
        ("CPU", "cpu"),
        (torch.device("cuda:1"), "cuda:1"),
        (torch.device("cpu"), "cpu"),
        (np.int64(2), "cuda:2"),
        (np.uint8(1), "cuda:1"),
    ],
)
def test_what_names_a_device(device: object, tag: str) -> None:
    assert parse_owner(device).tag == tag


@pytest.mark.parametrize(
    "device",
    [
        True,
        False,
        np.True_,
        -1,
        "-1",
        "cuda",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:1.0",
        "mps",
        "meta",
        "gpu1",
        "",
        1.0,
        None,
        fractions.Fraction(1),
        (1,),
        b"cuda:1",
        torch.device("cuda"),
        torch.device("meta"),
    ],
    ids=repr,
)
def test_what_names_no_device_is_refused_with_the_valid_forms(device: object) -> None:
    with pytest.raises(DeviceResolutionError, match="cuda:1"):
        parse_owner(device)


def test_the_bare_word_cuda_is_refused_with_a_reason() -> None:
    with pytest.raises(DeviceResolutionError, match="without an index"):
        parse_owner("cuda")


def test_the_message_says_where_the_value_came_from() -> None:
    with pytest.raises(DeviceResolutionError, match=r"^DEVGUARD_DEVICE is 'gpu'"):
        found({"DEVGUARD_DEVICE": "gpu"})


def test_a_resolution_error_is_a_value_error() -> None:
    assert issubclass(DeviceResolutionError, ValueError)
    assert issubclass(ConfigError, ValueError)


def test_what_operator_index_raises_by_itself_is_not_hidden() -> None:
    class Broken:
        def __index__(self) -> int:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        operator.index(Broken())
    with pytest.raises(ZeroDivisionError):
        parse_owner(Broken())


# --- DEVGUARD_DEVICE ---


@pytest.mark.parametrize(
    ("value", "tag"),
    [("cuda:1", "cuda:1"), ("1", "cuda:1"), ("cpu", "cpu"), (" cuda:3 ", "cuda:3"), ("CUDA:0", "cuda:0")],
)
def test_devguard_device_names_the_owner(value: str, tag: str) -> None:
    assert found({"DEVGUARD_DEVICE": value}) == tag


@pytest.mark.usefixtures("four_devices")
def test_devguard_device_comes_before_every_launcher() -> None:
    everything = {**dict.fromkeys(RANKS, "2"), "DEVGUARD_DEVICE": "cuda:1"}
    assert found(everything) == "cuda:1"


@pytest.mark.usefixtures("four_devices")
def test_an_empty_devguard_device_says_nothing() -> None:
    assert found({"DEVGUARD_DEVICE": " ", "LOCAL_RANK": "2"}) == "cuda:2"


@pytest.mark.parametrize("value", ["cuda", "gpu", "-1", "cuda:x", "1,2", "mps"])
def test_garbage_in_devguard_device_is_an_error(value: str) -> None:
    with pytest.raises(DeviceResolutionError, match="DEVGUARD_DEVICE"):
        found({"DEVGUARD_DEVICE": value})


@pytest.mark.parametrize("size", SIZES)
def test_devguard_device_for_several_local_ranks_is_a_configuration_error(size: str) -> None:
    with pytest.raises(ConfigError, match=f"{size}.*4"):
        found({"DEVGUARD_DEVICE": "cuda:1", size: "4"})


@pytest.mark.parametrize("size", [name for name in SIZES if name.startswith("SLURM")])
@pytest.mark.parametrize("form", ["4", "4(x2)", "2(x3),1", " 8 "])
def test_every_form_in_which_slurm_writes_tasks_per_node_counts(size: str, form: str) -> None:
    with pytest.raises(ConfigError, match=size):
        found({"DEVGUARD_DEVICE": "cuda:1", size: form})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", ["1", "1(x4)", "", "many"])
def test_devguard_device_for_a_single_local_rank_is_fine(size: str, value: str) -> None:
    assert found({"DEVGUARD_DEVICE": "cuda:1", size: value}) == "cuda:1"


@pytest.mark.parametrize("size", SIZES)
def test_several_local_ranks_may_all_own_the_cpu(size: str) -> None:
    assert found({"DEVGUARD_DEVICE": "cpu", size: "4"}) == "cpu"


# --- launchers ---


def test_the_launchers_are_the_seven_of_the_documentation() -> None:
    assert RANKS == [
        "LOCAL_RANK",
        "SLURM_LOCALID",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MPI_LOCALRANKID",
        "PMI_LOCAL_RANK",
        "PALS_LOCAL_RANKID",
    ]


@pytest.mark.parametrize("variable", RANKS)
@pytest.mark.usefixtures("four_devices")
def test_each_launcher_variable_names_the_owner(variable: str) -> None:
    assert found({variable: "2"}) == "cuda:2"
    assert found({variable: " 3 "}) == "cuda:3"
    assert found({variable: "0"}) == "cuda:0"


@pytest.mark.parametrize("position", range(len(RANKS) - 1))
@pytest.mark.usefixtures("four_devices")
def test_an_earlier_launcher_comes_before_a_later_one(position: int) -> None:
    assert found({RANKS[position]: "1", **dict.fromkeys(RANKS[position + 1 :], "2")}) == "cuda:1"


@pytest.mark.usefixtures("four_devices")
def test_rank_is_never_an_index() -> None:
    assert found({"RANK": "1", "WORLD_SIZE": "2"}) is None
    assert found({"RANK": "1", "LOCAL_RANK": "3"}) == "cuda:3"


@pytest.mark.parametrize("variable", RANKS)
@pytest.mark.usefixtures("four_devices")
def test_minus_one_means_not_distributed_and_the_search_goes_on(variable: str) -> None:
    owner, looked = owner_from_environment({variable: "-1"})
    assert owner is None
    assert f"{variable} (-1, not distributed)" in looked


@pytest.mark.usefixtures("four_devices")
def test_after_minus_one_a_later_launcher_is_asked() -> None:
    assert found({"LOCAL_RANK": "-1", "SLURM_LOCALID": "1"}) == "cuda:1"


@pytest.mark.parametrize("variable", RANKS)
@pytest.mark.parametrize("value", ["one", "1.0", "-2", "cuda:1", "0x1", "1 2"])
@pytest.mark.usefixtures("four_devices")
def test_garbage_from_a_launcher_is_an_error_that_names_the_variable(variable: str, value: str) -> None:
    with pytest.raises(DeviceResolutionError, match=f"{variable} is '{value}'"):
        found({variable: value})


@pytest.mark.parametrize("variable", RANKS)
def test_an_index_out_of_range_names_cuda_visible_devices(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    with pytest.raises(DeviceResolutionError, match=rf"{variable}=2 names cuda:2.*CUDA_VISIBLE_DEVICES='6,7'"):
        found({variable: "2"})


def test_out_of_range_says_so_when_cuda_visible_devices_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "device_count", lambda: 2)
    with pytest.raises(DeviceResolutionError, match=r"cuda:0 to cuda:1 \(CUDA_VISIBLE_DEVICES is not set\)"):
        found({"LOCAL_RANK": "5"})


def test_a_rank_where_no_device_is_visible_is_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "device_count", lambda: 0)
    with pytest.raises(DeviceResolutionError, match=r"no CUDA device is visible.*CUDA_VISIBLE_DEVICES"):
        found({"LOCAL_RANK": "0"})


@pytest.mark.parametrize("variable", RANKS)
@pytest.mark.parametrize("rank", ["0", "1", "7"])
def test_exactly_one_visible_device_is_index_0_whatever_the_rank(
    variable: str, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "device_count", lambda: 1)
    assert found({variable: rank}) == "cuda:0"


# --- the search as a whole, through guards ---


def test_nothing_found_is_an_error_that_lists_what_was_looked_at() -> None:
    with pytest.raises(DeviceResolutionError) as caught, devguard.guard():
        pass
    for name in ("DEVGUARD_DEVICE", *RANKS, "enclosing guard"):
        assert name in str(caught.value)
    assert ", RANK," not in str(caught.value)


def test_the_list_says_what_the_argument_and_resolve_said() -> None:
    @devguard.guard(argument="gpu_id")
    def work(gpu_id: int | None = None) -> None: ...

    with pytest.raises(DeviceResolutionError, match=r"the argument gpu_id \(None\), DEVGUARD_DEVICE"):
        work()
    with (
        pytest.raises(DeviceResolutionError, match=r"resolve\(\) \(None\), DEVGUARD_DEVICE"),
        devguard.guard(resolve=lambda: None),
    ):
        pass


def test_guard_without_a_device_follows_the_environment_then_the_enclosing_guard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FakeCuda(4).installed() as cuda, devguard.guard(3):
        with devguard.guard():
            assert cuda.current == 3
        monkeypatch.setenv("LOCAL_RANK", "1")
        with devguard.guard():
            assert cuda.current == 1
        monkeypatch.setenv("DEVGUARD_DEVICE", "cuda:2")
        with devguard.guard():
            assert cuda.current == 2
        assert cuda.current == 3


def test_remap_without_a_device_follows_the_enclosing_guard_then_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with FakeCuda(4).installed() as cuda:
        with devguard.remap():
            assert cuda.current == 1
        with devguard.guard(3), devguard.remap():
            assert cuda.current == 3


def test_the_environment_is_read_at_each_entry_and_not_when_the_guard_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scope = devguard.guard()
    with FakeCuda(4).installed() as cuda:
        for rank in ("1", "2"):
            monkeypatch.setenv("LOCAL_RANK", rank)
            with scope:
                assert cuda.current == int(rank)


def test_a_guard_out_of_range_names_cuda_visible_devices_and_leaves_no_scope() -> None:
    with FakeCuda(2).installed() as cuda:
        with pytest.raises(DeviceResolutionError, match="CUDA_VISIBLE_DEVICES"), devguard.guard(2):
            pass
        assert devguard.owner() is None
        assert cuda.calls == []


def test_a_gpu_owner_on_a_build_without_cuda_says_what_to_do() -> None:
    with pytest.raises(DeviceResolutionError, match="devguard sim"), devguard.guard("cuda:0"):
        pass


def test_owned_lists_each_device_that_was_an_owner() -> None:
    assert owned_tags() == []
    with FakeCuda(4).installed(), devguard.guard(2), devguard.guard("cpu"):
        assert owned_tags() == ["cpu", "cuda:2"]
        assert devguard.status()["owned"] == ["cpu", "cuda:2"]
