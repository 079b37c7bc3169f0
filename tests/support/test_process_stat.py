"""The file ``stat`` of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from devguard.support.process_stat import ENDED, STARTED, STATE, read_fields


def test_the_name_of_the_command_may_hold_anything(tmp_path: Path) -> None:
    fields = ["S", *map(str, range(1, 50))]
    (tmp_path / "stat").write_bytes(b"7 (a) Z (b\xff) " + " ".join(fields).encode() + b"\n")
    assert read_fields(tmp_path) == fields


def test_a_process_is_seen_until_it_is_collected() -> None:
    own = read_fields(Path("/proc", str(os.getpid())))
    child = subprocess.Popen([sys.executable, "-S", "-c", ""], stdout=subprocess.PIPE)
    place = Path("/proc", str(child.pid))
    assert int(read_fields(place)[STARTED]) >= int(own[STARTED]) > 0
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert read_fields(place)[STATE] in ENDED
    assert own[STATE] not in ENDED
    child.communicate()
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        read_fields(place)
