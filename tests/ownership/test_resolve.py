"""Finding the owner in ``DEVGUARD_DEVICE`` and in the variables of launchers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import devguard
from devguard import ConfigError, DeviceResolutionError
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


# --- DEVGUARD_DEVICE ---


def test_the_message_names_the_variable_of_a_bad_value() -> None:
    with pytest.raises(DeviceResolutionError, match=r"^DEVGUARD_DEVICE is 'gpu'"):
        found({"DEVGUARD_DEVICE": "gpu"})


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
def test_an_empty_devguard_device_is_ignored() -> None:
    assert found({"DEVGUARD_DEVICE": " ", "LOCAL_RANK": "2"}) == "cuda:2"


@pytest.mark.parametrize("value", ["cuda", "gpu", "-1", "cuda:x", "1,2", "mps"])
def test_a_malformed_devguard_device_is_an_error(value: str) -> None:
    with pytest.raises(DeviceResolutionError, match="DEVGUARD_DEVICE"):
        found({"DEVGUARD_DEVICE": value})


@pytest.mark.parametrize("size", SIZES)
def test_devguard_device_for_several_local_ranks_is_a_configuration_error(size: str) -> None:
    with pytest.raises(ConfigError, match=f"{size}.*4"):
        found({"DEVGUARD_DEVICE": "cuda:1", size: "4"})


@pytest.mark.parametrize("size", [name for name in SIZES if name.startswith("SLURM")])
@pytest.mark.parametrize("form", ["4", "4(x2)", "2(x3),1", " 8 "])
def test_every_form_of_slurms_tasks_per_node_is_read(size: str, form: str) -> None:
    with pytest.raises(ConfigError, match=size):
        found({"DEVGUARD_DEVICE": "cuda:1", size: form})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", ["1", "1(x4)", "", "many"])
def test_devguard_device_for_a_single_local_rank_is_fine(size: str, value: str) -> None:
    assert found({"DEVGUARD_DEVICE": "cuda:1", size: value}) == "cuda:1"


@pytest.mark.parametrize("size", SIZES)
def test_several_local_ranks_may_all_own_the_cpu(size: str) -> None:
    assert found({"DEVGUARD_DEVICE": "cpu", size: "4"}) == "cpu"


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.rank)
@pytest.mark.parametrize("form", ["{}", "cuda:{}"])
def test_a_device_that_is_the_local_rank_was_named_for_each_rank(launcher: Any, form: str) -> None:
    for rank in ("0", "1", "3"):
        assert (
            found({"DEVGUARD_DEVICE": form.format(rank), launcher.rank: rank, launcher.size[0]: "4"}) == f"cuda:{rank}"
        )


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.rank)
def test_a_device_that_is_not_the_local_rank_is_an_error_that_names_both(launcher: Any) -> None:
    environ = {"DEVGUARD_DEVICE": "cuda:1", launcher.rank: "0", launcher.size[0]: "2"}
    with pytest.raises(
        ConfigError, match=rf"DEVGUARD_DEVICE=cuda:1 .* {launcher.size[0]} counts 2.* 0 \({launcher.rank}\)"
    ):
        found(environ)


def test_one_device_for_all_ranks_is_right_where_each_rank_sees_one_gpu() -> None:
    environ = {"DEVGUARD_DEVICE": "cuda:0", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "3"}
    assert found(environ) == "cuda:0"
    for visible in ("", "-1", "2,3"):
        with pytest.raises(ConfigError, match="to every process"):
            found({**environ, "CUDA_VISIBLE_DEVICES": visible})


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
def test_after_minus_one_a_later_launcher_is_read() -> None:
    assert found({"LOCAL_RANK": "-1", "SLURM_LOCALID": "1"}) == "cuda:1"


@pytest.mark.parametrize("variable", RANKS)
@pytest.mark.parametrize("value", ["one", "1.0", "-2", "cuda:1", "0x1", "1 2"])
@pytest.mark.usefixtures("four_devices")
def test_a_malformed_rank_is_an_error_that_names_the_variable(variable: str, value: str) -> None:
    with pytest.raises(DeviceResolutionError, match=f"{variable} is '{value}'"):
        found({variable: value})


@pytest.mark.parametrize("variable", RANKS)
def test_an_index_out_of_range_names_cuda_visible_devices(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    with pytest.raises(DeviceResolutionError, match=rf"{variable}=2 names cuda:2.*CUDA_VISIBLE_DEVICES='6,7'"):
        found({variable: "2"})


def test_out_of_range_reports_that_cuda_visible_devices_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "device_count", lambda: 2)
    with pytest.raises(DeviceResolutionError, match=r"cuda:0 to cuda:1 \(CUDA_VISIBLE_DEVICES is not set\)"):
        found({"LOCAL_RANK": "5"})


def test_a_rank_where_no_device_is_visible_is_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "device_count", lambda: 0)
    with pytest.raises(DeviceResolutionError, match=r"no CUDA device is visible.*CUDA_VISIBLE_DEVICES"):
        found({"LOCAL_RANK": "0"})


@pytest.mark.parametrize("variable", RANKS)
@pytest.mark.parametrize("rank", ["0", "1", "7"])
def test_a_single_visible_device_is_index_0_for_every_rank(
    variable: str, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "device_count", lambda: 1)
    assert found({variable: rank}) == "cuda:0"


# --- no owner ---


def test_finding_no_owner_is_an_error_that_lists_what_was_searched() -> None:
    with pytest.raises(DeviceResolutionError) as caught, devguard.guard():
        pass
    for name in ("DEVGUARD_DEVICE", *RANKS, "enclosing guard"):
        assert name in str(caught.value)
    assert ", RANK," not in str(caught.value)


def test_the_list_includes_the_argument_and_resolve() -> None:
    @devguard.guard(argument="gpu_id")
    def work(gpu_id: int | None = None) -> None: ...

    with pytest.raises(DeviceResolutionError, match=r"the argument gpu_id \(None\), DEVGUARD_DEVICE"):
        work()
    with (
        pytest.raises(DeviceResolutionError, match=r"resolve\(\) \(None\), DEVGUARD_DEVICE"),
        devguard.guard(resolve=lambda: None),
    ):
        pass


FEW = settings(max_examples=60)


@FEW
@given(st.dictionaries(st.sampled_from([launcher.rank for launcher in LAUNCHERS]), st.text(max_size=4), max_size=3))
def test_any_rank_is_an_owner_or_a_resolution_error(environ: dict[str, str]) -> None:
    with FakeCuda(4).installed():
        try:
            owner, looked = owner_from_environment(environ)
        except devguard.DeviceResolutionError as error:
            ok = any(name in str(error) for name in environ)
        else:
            ok = bool(looked) and (owner is None or 0 <= owner.index < 4)
    assert ok


@pytest.mark.parametrize("rank", ["9" * 5000, "-1", "²", "x"])
def test_a_local_rank_that_is_no_rank_is_not_compared_with_the_named_device(rank: str) -> None:
    environ = {"DEVGUARD_DEVICE": "cuda:1", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "4"}
    with pytest.raises(ConfigError, match="would give one GPU to every process"):
        owner_from_environment(environ)
