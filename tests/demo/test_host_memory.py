"""Sampling the private memory of processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from devguard.demo.host_memory import Sampler, private_bytes, shared_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SIZE = 64 << 20


def test_private_memory_is_that_of_living_processes_only() -> None:
    before = private_bytes([os.getpid()])
    held = bytearray(os.urandom(1)) * SIZE
    assert private_bytes([os.getpid(), 1 << 30]) >= before + SIZE // 2
    del held


def test_the_peak_of_a_block_is_what_its_processes_held_at_most() -> None:
    with Sampler([os.getpid()]) as sampler:
        for _ in range(3):
            held = bytearray(b"x") * SIZE
            before = sampler.private
            del held
    assert before == 0  # known after the block
    assert SIZE // 2 <= sampler.private <= 3 * SIZE


def test_a_killed_sampler_leaves_no_figure_and_no_error() -> None:
    with Sampler([os.getpid()]) as sampler:
        sampler._process.kill()
        sampler._process.join()
    assert (sampler.private, sampler.shared) == (0, 0)


def test_a_missing_folder_holds_nothing(tmp_path: Path) -> None:
    assert shared_bytes(str(tmp_path / "none")) == 0
    assert shared_bytes(str(tmp_path)) > 0
