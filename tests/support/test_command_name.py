"""The short name of a process."""

from __future__ import annotations

import pytest

from devguard.support.command_name import shorten


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["/usr/bin/python3", "train.py", "--lr", "1"], "train.py"),
        (["python", "-W", "error", "-X", "dev", "/a/b/serve.py"], "serve.py"),
        (["python3.11", "-m", "torch.distributed.run"], "python3.11 -m torch.distributed.run"),
        (["python", "-c", "from multiprocessing.spawn import spawn_main"], "multiprocessing child"),
        (["python", "-c", "import torch"], "python -c"),
        (["python"], "python"),
        (["/opt/bin/server", "-x"], "server"),
        (["rank 1"], "rank 1"),
        ([""], "?"),
        ([], "?"),
    ],
)
def test_a_process_has_a_short_name(command: list[str], name: str) -> None:
    assert shorten(command) == name
