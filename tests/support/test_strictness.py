"""``DEVGUARD_STRICT``: a process ends where its guard cannot be in force."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from devguard import ConfigError
from devguard.support import notices, strictness
from tests.helpers.simulated import ROOT


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), (" Yes ", True), ("on", True), ("0", False), ("FALSE", False)]
)
def test_valid_values(text: str, value: bool) -> None:
    assert strictness.parse_strict(text) is value
    assert strictness.is_strict({"DEVGUARD_STRICT": text}) is value


@pytest.mark.parametrize("text", ["2", "maybe", "strict", "\udcff", "1.0"])
def test_other_values_are_an_error_with_the_valid_ones(text: str) -> None:
    with pytest.raises(ConfigError, match=r"DEVGUARD_STRICT=.* is not valid\. Valid: 1 .* or 0"):
        strictness.parse_strict(text)
    assert not strictness.is_strict({"DEVGUARD_STRICT": text})


def test_without_the_variable_the_process_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notices, "_alerts", {})
    monkeypatch.delenv("DEVGUARD_STRICT", raising=False)
    strictness.report_off("devguard is off")
    assert capsys.readouterr().err == "devguard is off\n"


@pytest.mark.parametrize("place", ["report()", "thread(report)", "try_(report)"])
def test_a_strict_process_ends_wherever_it_is(place: str) -> None:
    code = f"""if True:
        import threading
        from devguard.support import strictness
        report = lambda: strictness.report_off("devguard is off.")
        def thread(run):
            threading.Thread(target=run).start()
            threading.Event().wait()
        def try_(run):
            try:
                run()
            except BaseException:
                pass
        print("before")
        {place}
        print("after")
    """
    env = os.environ | {"DEVGUARD_STRICT": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (strictness.STATUS, "before\n")
    assert done.stderr == "devguard is off. This process ends here, because DEVGUARD_STRICT=1.\n"
