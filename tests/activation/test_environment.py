"""The settings in devguard's environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from devguard import ConfigError
from devguard.activation import environment
from devguard.activation.environment import Settings


@pytest.mark.parametrize("environ", [{}, {"DEVGUARD": " "}, {"DEVGUARD": "", "DEVGUARD_DOORS": ",", "RANK": "1"}])
def test_unset_and_empty_variables_set_nothing(environ: dict[str, str]) -> None:
    assert environment.read(environ) == Settings()


def test_every_variable_is_read(tmp_path: Path) -> None:
    found = environment.read(
        {
            "DEVGUARD": "Warn",
            "DEVGUARD_DEVICE": "1",
            "DEVGUARD_DOORS": "ipc=copy, threads = off",
            "DEVGUARD_LOG": str(tmp_path / "new"),
            "DEVGUARD_TRANSPORT": "Host",
            "DEVGUARD_TRANSPORT_BUDGET": "512 MiB",
        }
    )
    assert (found.mode, found.owner and found.owner.tag) == ("warn", "cuda:1")
    assert found.doors == {"ipc": "copy", "threads": "off"}
    assert found.log == tmp_path / "new"
    assert (found.transport, found.budget) == ("host", 512 << 20)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("value", "mode"), [("1", "repair"), ("0", "off"), ("OFF", "off"), ("error", "error")])
def test_numbers_are_short_forms_of_modes(value: str, mode: str) -> None:
    assert environment.read({"DEVGUARD": value}).mode == mode


def test_a_relative_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert environment.read({"DEVGUARD_LOG": "logs"}).log == tmp_path / "logs"


def test_one_error_names_every_invalid_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environ = {
        "DEVGUARD": "loud",
        "DEVGUARD_DEVICE": "gpu",
        "DEVGUARD_DOORS": "window=warn",
        "DEVGUARD_LOG": str(tmp_path / "file"),
        "DEVGUARD_TRANSPORT": "cuda",
        "DEVGUARD_TRANSPORT_BUDGET": "1 KiB",
    }
    with pytest.raises(ConfigError) as caught:
        environment.read(environ)
    problems = environment.find_problems(environ)
    assert str(caught.value) == " ".join(problems)
    for problem, name in zip(problems, environ, strict=True):
        assert problem.startswith(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("load", "cannot be read. Valid: door=mode"),
        ("load=loud", "'loud' is not a mode"),
        ("lod=warn", "no door 'lod'"),
    ],
)
def test_malformed_doors_are_an_error_that_names_the_source(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--devguard-doors.*{message}"):
        environment.parse_doors(text, "--devguard-doors")


def test_an_unknown_transport_is_an_error_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"DEVGUARD_TRANSPORT='cuda' is not a transport\. Valid: host, off, 0\."):
        environment.read({"DEVGUARD_TRANSPORT": "cuda"})
    assert environment.read({"DEVGUARD_TRANSPORT": "off"}).transport == "off"


@pytest.mark.parametrize("text", ["much", "-1", "64", "1EiB", "9" * 30])
def test_a_budget_is_a_size_of_at_least_64_kib(text: str) -> None:
    with pytest.raises(ConfigError, match=r"DEVGUARD_TRANSPORT_BUDGET=.* is not a budget\. Valid: a size such as 1GiB"):
        environment.read({"DEVGUARD_TRANSPORT_BUDGET": text})
