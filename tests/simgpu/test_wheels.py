"""Installing wheels with pip, and explaining its failures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from devguard import SimulationError
from devguard.simgpu import wheels
from devguard.simgpu.progress import Reporter
from tests.simgpu.conftest import write_wheel


def install(requirement: str, folder: Path) -> None:
    wheels.install(
        [requirement],
        folder / "target",
        dependencies=False,
        scratch=folder,
        text="installing",
        expected=1,
        report=Reporter(enabled=False),
    )


def test_the_installed_torch_is_named_without_its_local_part() -> None:
    assert wheels.installed_torch() == torch.__version__.partition("+")[0]


def test_requirements_that_are_installed_or_simulated_are_not_missing(tmp_path: Path) -> None:
    info = tmp_path / "torch-99.1.0.dist-info"
    info.mkdir()
    requirements = ["pytest", "no-such-package>=2", "nvidia-nccl-cu13==2", "triton", "optree; extra == 'optree'"]
    lines = [f"Requires-Dist: {requirement}" for requirement in requirements]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", "Name: torch", "Version: 99.1.0", *lines]))
    assert wheels.missing_requirements(tmp_path) == ["no-such-package>=2"]


def test_pip_installs_into_the_given_folder_for_any_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(tmp_path, "tiny", "1.0", {"tiny.py": b""})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    for name in ("PIP_USER", "PIP_REQUIRE_VIRTUALENV", "PIP_DRY_RUN"):
        monkeypatch.setenv(name, "1")
    install("tiny", tmp_path)
    assert (tmp_path / "target/tiny.py").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_a_package_that_cannot_be_installed_is_an_error_with_the_output_of_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SimulationError, match=r"no-such-package could not be downloaded(.|\n)*  pip: ERROR"):
        install("no-such-package", tmp_path)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("ERROR: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "interrupted or damaged"),
        ("WARNING: Temporary failure in name resolution", "cannot be reached"),
        ("ERROR: No matching distribution found (from versions: 1.0)", f"for Python {sys.version_info.major}."),
        ("ERROR: something else", "fix the problem that pip reports"),
    ],
)
def test_each_kind_of_failure_is_explained(output: str, reason: str) -> None:
    message = wheels._explain(["torch==99"], output)
    assert reason in message
    assert "torch==99" in message
    assert f"\n  pip: {output}" in message


def test_the_cause_in_a_warning_is_shown_with_the_error() -> None:
    output = """Looking in indexes: https://index
WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(Name or service not known)'
WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(Name or service not known)'
ERROR: Could not find a version that satisfies the requirement torch==99 (from versions: none)
ERROR: No matching distribution found for torch==99
"""
    message = wheels._explain(["torch==99"], output)
    assert message.count("  pip: ") == 3
    assert "pip: WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(Name" in message
    assert message.index("WARNING") < message.index("ERROR")


def test_a_quiet_configuration_of_pip_hides_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_QUIET", "3")
    with pytest.raises(SimulationError, match=r"  pip: ERROR: "):
        install("no-such-package", tmp_path)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH came with Python 3.11")
def test_pip_runs_no_code_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(tmp_path, "tiny", "1.0", {"tiny.py": b""})
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("pip", "json", "sitecustomize"):
        (hostile / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    install("tiny", tmp_path)
    assert (tmp_path / "target/tiny.py").exists()
    assert not (tmp_path / "ran").exists()
