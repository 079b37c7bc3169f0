"""SGLang's modules can be imported on simulated GPUs from the folders in the cache, and take their CPU paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.simulated import ROOT, run_simulated
from tests.sglang.environment import NEWEST, OLDEST, POSSIBLE, sglang_environment

pytestmark = [
    pytest.mark.skipif(not POSSIBLE, reason="SGLang 0.5.23 needs Python 3.11"),
    pytest.mark.timeout(600),  # The first test installs SGLang.
]

ENTRY_POINTS = """
    import json
    import sglang.srt.managers.data_parallel_controller, sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler, sglang.srt.entrypoints.engine, sglang.version
    import sglang.srt.utils.common as common
    import torch
    held = [index for index in range(torch.cuda.device_count()) if torch._C._cuda_hasPrimaryContext(index)]
    print(json.dumps([sglang.version.__version__, torch.cuda.is_available(), common.is_cuda(), held]))
"""


def test_the_newest_release_can_be_imported_and_opens_no_context(tmp_path: Path) -> None:
    assert run_simulated(ENTRY_POINTS, env=sglang_environment(2, folder=tmp_path), timeout=500).result == [
        NEWEST,
        True,
        False,
        [],
    ]


def test_the_last_release_with_the_original_bug_can_be_imported(tmp_path: Path) -> None:
    program = """
        import json
        from tests.sglang import older
        import sglang.srt.utils, sglang.version
        print(json.dumps([sglang.version.__version__, hasattr(sglang.srt.utils, "broadcast_pyobj")]))
    """
    assert run_simulated(program, env=sglang_environment(2, release=OLDEST, folder=tmp_path)).result == [OLDEST, True]


def test_the_example_prints_its_out_file(tmp_path: Path) -> None:
    example = ROOT / "examples/sglang/engine.py"
    done = run_simulated([example], env=sglang_environment(2, folder=tmp_path), timeout=500)
    assert done.stdout == example.with_suffix(".out").read_text(encoding="utf-8")
