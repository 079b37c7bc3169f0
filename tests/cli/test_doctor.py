"""``devguard doctor``: what it finds, what it says, and that it opens nothing itself."""

from __future__ import annotations

import json
import os

import pytest

from devguard import cli
from devguard.cli import doctor, variables
from devguard.demo.launch import clean


@pytest.fixture
def environ(monkeypatch):
    """A clean environment, as os.environ."""
    for name in set(os.environ) - set(clean(os.environ)):
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def checked(monkeypatch):
    """Replace the self-check by a good one, which the test may change."""
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


def test_a_good_environment_is_fine_and_the_guard_effective(environ, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == 0
    assert found["problems"] == found["configuration"] == []
    assert found["check"]["effective"] is True
    assert found["check"]["recorded"] is True
    assert found["doors"]["load"]["open"] is True
    assert set(found["versions"]) >= {"devguard", "python", "torch", "cuda", "driver", "wrapt"}
    assert found["advice"]


def test_the_kill_switch_is_a_problem_that_the_check_sees(environ, capsys):
    environ.setenv("DEVGUARD", "off")
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "NOT effective" in text
    assert "problem: DEVGUARD=off keeps every door closed" in text


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("DEVGUARD", "repiar", "'repiar' is not a mode. Valid: off, observe, warn, repair, error, 0, 1."),
        ("DEVGUARD_DEVICE", "gpu one", "DEVGUARD_DEVICE is 'gpu one'"),
        ("DEVGUARD_DOORS", "load", "cannot be read. Valid: door=mode"),
        ("DEVGUARD_DOORS", "lod=warn", "there is no door 'lod'"),
        ("DEVGUARD_DOORS", "load=wran", "'wran' is not a mode"),
        ("DEVGUARD_LOG", __file__, "is not a directory"),
        ("DEVGUARD_DEVISE", "1", "DEVGUARD_DEVISE is not a variable that devguard knows. Known: DEVGUARD,"),
    ],
)
def test_a_setting_that_means_nothing_ends_with_2(environ, checked, capsys, name, value, said):
    environ.setenv(name, value)
    assert cli.main(["doctor"]) == 2
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"DEVGUARD": "observe", "DEVGUARD_DEVICE": "cuda:1", "DEVGUARD_DOORS": "load=warn, buffers=repair"},
        {"DEVGUARD": "1", "DEVGUARD_SIM_GPUS": "2", "DEVGUARD_CACHE_DIR": "/tmp"},
    ],
)
def test_good_settings_pass(settings):
    assert variables.check_settings(settings) == []


def test_a_mode_that_nothing_acted_on_is_a_problem(environ, checked, capsys):
    environ.setenv("DEVGUARD", "repair")
    assert cli.main(["doctor"]) == 1
    assert "importing torch opened no door" in capsys.readouterr().out
    checked["open_at_import"] = ["load"]
    assert cli.main(["doctor"]) == 0


def test_without_torch_it_says_what_to_install(monkeypatch, capsys):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "torch" else real(name))
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "torch: not installed" in text
    assert "pip install 'torch-devguard[torch]'" in text


def test_a_torch_that_cannot_be_imported_is_a_problem_with_its_last_words(environ, tmp_path, capsys):
    (tmp_path / "torch.py").write_text("raise ImportError('libfoo.so: cannot open')")
    environ.setenv("PYTHONPATH", str(tmp_path))
    assert cli.main(["doctor"]) == 1
    assert "libfoo.so: cannot open" in capsys.readouterr().out


def test_a_guard_that_does_not_work_is_a_problem(environ, checked, capsys):
    checked["check"].update(effective=False, landed="cuda:0", contexts=["cuda:0", "cuda:1"])
    assert cli.main(["doctor"]) == 1
    assert "the guard is not effective here" in capsys.readouterr().out


def test_early_copies_and_closed_doors_are_named(environ, checked, capsys):
    checked["doors"]["load"]["early_copies"] = ["server.frombuffer"]
    checked["doors"]["jit"] = {"open": False, "mode": "off", "problem": "torch.jit.load is not in torch 9"}
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "note: copies of torch's functions taken before the doors opened pass them by: server.frombuffer." in text
    assert "problem: door jit: torch.jit.load is not in torch 9" in text


def test_a_local_rank_without_a_device_is_bad_configuration(environ, capsys):
    environ.setenv("LOCAL_RANK", "64")
    assert cli.main(["doctor"]) == 2
    assert "LOCAL_RANK=64 names cuda:64" in capsys.readouterr().out


@pytest.mark.parametrize(("gpus", "owner", "tag"), [(2, "cuda:1", "cuda:0"), (1, "cuda:0", "cuda:1")])
def test_on_gpus_it_checks_on_one_gpu_and_opens_nothing_elsewhere(sim_environment, run_simulated, gpus, owner, tag):
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


def test_the_message_of_the_check_is_one_that_strays_without_a_guard(run_simulated):
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
def test_it_names_the_wrong_device_bugs_of_the_sglang_here(environ, checked, monkeypatch, capsys, version, original):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == "sglang" else real(name))
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"SGLang {version}\n" in said
    assert "broadcast_pyobj" in said
    assert "door load: rebuilt on the rank's own GPU" in said
    assert ("pixel_values made on GPU 0" in said) is original


def test_it_says_that_an_sglang_is_not_one_of_those_it_knows(environ, checked, monkeypatch, capsys):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "0.6.0" if name == "sglang" else real(name))
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "note: devguard knows the processes of SGLang 0.4.6 to 0.5.23, and this is 0.6.0" in said
    assert "wrong GPU" not in said


def test_without_sglang_it_says_nothing_of_it(environ, checked, monkeypatch, capsys):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "sglang" else real(name))
    assert cli.main(["doctor"]) == 0
    assert "SGLang" not in capsys.readouterr().out
