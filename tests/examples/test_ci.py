"""The gate of examples/ci in runs of torchrun with four ranks on simulated GPUs: it passes, and fails on a new line."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.helpers.simulated import ROOT

STRAY = '    return torch.load(CHECKPOINT)["weight"].sum()'
EDITS = {
    '"""Four ranks': '# The known stray moves down.\n\n"""Four ranks',
    "def main():": f"def evaluate():\n{STRAY}\n\n\ndef main():",
    "    resume()\n": "    resume()\n    evaluate()\n",
}


def run_gate(run_simulated: Any, environment: Any, folder: Path) -> tuple[int, str, str]:
    """Run gate.sh as its first lines say; return its status, what it printed, and its comment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    base = os.environ | {"PATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    words = ["-c", "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])", "sh", str(folder / "gate.sh")]
    done = run_simulated(words, env=environment(4, base=base), check=False)
    assert done.returncode in (0, 3), done.stderr
    return done.returncode, done.stdout, (folder / "strays.md").read_text()


def test_the_gate_passes_on_its_baseline_and_fails_with_the_line_on_one_new_stray(
    run_simulated: Any, sim_environment: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(ROOT / "examples" / "ci", tmp_path / "ci")
    status, out, comment = run_gate(run_simulated, sim_environment, folder)
    known = "besides 1 known one in baseline.json"
    assert (status, out.splitlines()[0]) == (0, "5 process(es), 3 stray(s) at 1 call site(s), 12.0 KiB")
    assert f"\npasses: no new call site with strays, {known}" in out
    assert comment.startswith("### devguard: passes\n")

    code = (folder / "train.py").read_text()
    for before, after in EDITS.items():
        assert code.count(before) == 1
        code = code.replace(before, after)
    (folder / "train.py").write_text(code)
    status, out, comment = run_gate(run_simulated, sim_environment, folder)
    new = code.splitlines().index(STRAY) + 1
    assert status == 3
    assert f"\nfails: 1 new call site with strays, {known}" in out
    (line,) = (line for line in out.splitlines() if line.startswith("  train.py:"))
    assert line.startswith(f"  train.py:{new} in evaluate: load: cuda:0 -> cuda:")
    assert line.endswith(" [repaired] 3 x")
    assert "in resume" not in out
    assert comment.startswith("### devguard: fails, 1 new line with strays\n")
    results = json.loads((folder / "strays.sarif").read_text())["runs"][0]["results"]
    places = [each["locations"][0]["physicalLocation"] for each in results]
    assert {place["artifactLocation"]["uri"] for place in places} == {"train.py"}
    assert new in {place["region"]["startLine"] for place in places}
