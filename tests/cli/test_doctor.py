"""``devguard doctor``: its findings, its output, and that it opens no context."""

from __future__ import annotations

import json
import os
import sys

import pytest

from devguard import cli
from devguard.cli import doctor, shared_memory, variables
from devguard.demo.launch import clean


@pytest.fixture
def environ(monkeypatch):
    """Remove the variables of devguard and launchers from os.environ."""
    for name in set(os.environ) - set(clean(os.environ)):
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def checked(monkeypatch):
    """Replace the findings of the self-check by good ones that the test may change."""
    found = {
        "torch": "2.13.0+cpu",
        "torch_file": "torch/__init__.py",
        "cuda": None,
        "driver": None,
        "visible": 0,
        "names": [],
        "contexts": [],
        "open_at_import": [],
        "owner": {"device": None, "looked_at": [], "error": None},
        "check": {
            "owner": "cpu",
            "tag": "cuda:1",
            "landed": "cpu",
            "contexts": [],
            "recorded": True,
            "values": True,
            "error": None,
            "effective": True,
        },
        "doors": {"load": {"open": True, "mode": "repair", "early_copies": []}},
    }
    monkeypatch.setattr(doctor, "_self_check", lambda environ: found)
    return found


def test_in_a_good_environment_the_guard_is_effective_and_the_status_is_0(environ, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == 0
    assert found["problems"] == found["configuration"] == []
    assert found["check"]["effective"] is True
    assert found["check"]["recorded"] is True
    assert found["doors"]["load"]["open"] is True
    assert set(found["versions"]) >= {"devguard", "python", "torch", "cuda", "driver", "wrapt"}
    assert found["advice"]


def test_what_lies_in_shared_memory_is_listed_and_no_problem(environ, checked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    (tmp_path / f"torch_{2**22}_1_1").write_bytes(b"x")  # no process has that pid
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shared_memory"]["left_entries"] == 1
    assert cli.main(["doctor"]) == 0
    assert "left by processes that have ended: devguard doctor --reap" in capsys.readouterr().out
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path / "missing")
    assert cli.main(["doctor"]) == 0
    assert f"there is no {tmp_path / 'missing'} here" in capsys.readouterr().out


def test_devguard_off_is_reported_as_a_problem(environ, capsys):
    environ.setenv("DEVGUARD", "off")
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "NOT effective" in text
    assert "problem: DEVGUARD=off keeps every door closed" in text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DEVGUARD", "repiar", "'repiar' is not a mode. Valid: off, observe, warn, repair, error, 0, 1."),
        ("DEVGUARD_DEVICE", "gpu one", "DEVGUARD_DEVICE is 'gpu one'"),
        ("DEVGUARD_DOORS", "load", "cannot be read. Valid: door=mode"),
        ("DEVGUARD_DOORS", "lod=warn", "there is no door 'lod'"),
        ("DEVGUARD_DOORS", "load=wran", "'wran' is not a mode"),
        ("DEVGUARD_LOG", __file__, "is not a directory"),
        ("DEVGUARD_DEVISE", "1", "DEVGUARD_DEVISE is not a variable of devguard. Valid: DEVGUARD,"),
    ],
)
def test_a_setting_that_is_not_valid_returns_2(environ, checked, capsys, name, value, message):
    environ.setenv(name, value)
    assert cli.main(["doctor"]) == 2
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"DEVGUARD": "observe", "DEVGUARD_DEVICE": "cuda:1", "DEVGUARD_DOORS": "load=warn, buffers=repair"},
        {"DEVGUARD": "1", "DEVGUARD_SIM_GPUS": "2", "DEVGUARD_CACHE_DIR": "/tmp"},
    ],
)
def test_valid_settings_have_no_problems(settings):
    assert variables.check_settings(settings) == []


def test_a_mode_that_opened_no_door_is_a_problem(environ, checked, capsys):
    environ.setenv("DEVGUARD", "repair")
    assert cli.main(["doctor"]) == 1
    assert "importing torch opened no door" in capsys.readouterr().out
    checked["open_at_import"] = ["load"]
    assert cli.main(["doctor"]) == 0


def test_without_torch_the_doctor_prints_how_to_install_it(monkeypatch, capsys):
    real = doctor._find_version
    monkeypatch.setattr(doctor, "_find_version", lambda name: None if name == "torch" else real(name))
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "torch: not installed" in text
    assert "pip install 'torch-devguard[torch]'" in text


def test_a_torch_that_cannot_be_imported_is_reported_with_its_error(environ, tmp_path, capsys):
    (tmp_path / "torch.py").write_text("raise ImportError('libfoo.so: cannot open')")
    environ.setenv("PYTHONPATH", str(tmp_path))
    assert cli.main(["doctor"]) == 1
    assert "libfoo.so: cannot open" in capsys.readouterr().out


def test_a_guard_that_is_not_effective_is_a_problem(environ, checked, capsys):
    checked["check"].update(effective=False, landed="cuda:0", contexts=["cuda:0", "cuda:1"])
    assert cli.main(["doctor"]) == 1
    assert "the guard is not effective here" in capsys.readouterr().out


def test_early_copies_and_closed_doors_are_reported(environ, checked, capsys):
    checked["doors"]["load"]["early_copies"] = ["server.frombuffer"]
    checked["doors"]["jit"] = {"open": False, "mode": "off", "problem": "torch.jit.load is not in torch 9"}
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "note: copies of torch functions made before the doors opened bypass the doors: server.frombuffer." in text
    assert "problem: door jit: torch.jit.load is not in torch 9" in text


def test_a_local_rank_without_a_device_returns_2(environ, capsys):
    environ.setenv("LOCAL_RANK", "64")
    assert cli.main(["doctor"]) == 2
    assert "LOCAL_RANK=64 names cuda:64" in capsys.readouterr().out


@pytest.mark.parametrize(("gpus", "owner", "tag"), [(2, "cuda:1", "cuda:0"), (1, "cuda:0", "cuda:1")])
def test_the_check_opens_a_context_on_one_gpu_only(sim_environment, run_simulated, gpus, owner, tag):
    environment = sim_environment(gpus, base=clean(os.environ))
    done = run_simulated(["-m", "devguard", "doctor", "--json"], env=environment)
    found = json.loads(done.stdout)
    assert found["devices"]["visible"] == gpus
    assert found["devices"]["simulated"] is True
    check = found["check"]
    assert (check["owner"], check["tag"], check["landed"], check["contexts"]) == (owner, tag, owner, [owner])
    assert check["effective"] is True
    opened = {(process.pid, device.index) for process in done.state for device in process.devices if device.context}
    assert {index for _, index in opened} == {int(owner[-1])}
    assert done.pid not in {pid for pid, _ in opened}


def test_the_tensor_of_the_check_strays_without_a_guard(run_simulated):
    done = run_simulated(
        """
        import pickle, torch
        from devguard.cli.selfcheck import VALUES, tagged_pickle
        tensor = pickle.loads(tagged_pickle("cuda:1"))
        assert (str(tensor.device), tensor.tolist()) == ("cuda:1", VALUES)
        """,
        gpus=2,
    )
    assert [device.context for device in done.me.devices] == [False, True]


@pytest.mark.parametrize(("version", "original"), [("0.4.6.post2", True), ("0.5.23", False)])
def test_the_known_bugs_of_the_installed_sglang_are_listed(environ, checked, monkeypatch, capsys, version, original):
    real = doctor._find_version
    monkeypatch.setattr(doctor, "_find_version", lambda name: version if name == "sglang" else real(name))
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"SGLang {version}\n" in text
    assert "broadcast_pyobj" in text
    assert "door load: rebuilt on the rank's own GPU" in text
    assert ("pixel_values made on GPU 0" in text) is original


def test_an_unsupported_sglang_is_reported_in_a_note(environ, checked, monkeypatch, capsys):
    real = doctor._find_version
    monkeypatch.setattr(doctor, "_find_version", lambda name: "0.6.0" if name == "sglang" else real(name))
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "note: devguard supports SGLang 0.4.6 to 0.5.23, and this is 0.6.0" in text
    assert "wrong GPU" not in text


def test_without_sglang_the_doctor_does_not_mention_it(environ, checked, monkeypatch, capsys):
    real = doctor._find_version
    monkeypatch.setattr(doctor, "_find_version", lambda name: None if name == "sglang" else real(name))
    assert cli.main(["doctor"]) == 0
    assert "SGLang" not in capsys.readouterr().out


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH came with Python 3.11")
def test_the_self_check_runs_no_code_from_the_working_folder(environ, tmp_path, monkeypatch, capsys):
    for name in ("json", "torch", "pickle"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "--json"]) == 0
    assert not (tmp_path / "ran").exists()
