"""Compare a real SGLang server on simulated GPUs without devguard and with only ``DEVGUARD=repair``.

``python -m tests.sglang.server`` makes a tiny Qwen2-VL (checkpoint.py) and starts SGLang's own server twice for each
configuration: tensor parallelism, then data parallelism. The model runs on the CPU, because simulated GPUs run no
kernels. Each scheduler still has its own GPU, and the tokenizer leaves its tensors of images on cuda:0
(server_plugin.py). Both servers get the same images over HTTP on 127.0.0.1. The command compares the answers, and what
each process holds on each GPU as the simulation recorded it (placement.py).

The exit status is 0 if the bug shows without devguard, is gone with it, and the answers are the same; otherwise 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from devguard import simgpu
from tests.helpers.simulated import ROOT
from tests.sglang import placement, questions, server_plugin
from tests.sglang.environment import sglang_environment
from tests.sglang.placement import Holding, Served

__all__ = ["compare", "main", "make_checkpoint"]

HOST = "127.0.0.1"
ARGUMENTS = {
    "--device": "cpu",
    "--host": HOST,
    "--attention-backend": "torch_native",
    "--mm-attention-backend": "sdpa",
    "--sampling-backend": "pytorch",
    "--context-length": "1024",
    "--max-total-tokens": "4096",
    "--max-running-requests": "4",
    "--random-seed": "0",
    "--skip-server-warmup": None,
    "--disable-radix-cache": None,  # So that every request is computed.
}
ENDING = 20.0  # Seconds that a server has to end before it is killed.


class ServerError(Exception):
    """A server did not start, or did not answer."""


def compare(
    folder: Path, images: Sequence[bytes], *, tp: int = 1, dp: int = 1, patience: float = 600
) -> tuple[Served, Served]:
    """Serve the same images without and with devguard.

    Parameters
    ----------
    folder : Path
        The folder for all output, with a model from `make_checkpoint` in it.
    images : sequence of bytes
        The pictures, as files.
    tp, dp : int
        The number of ranks of tensor and of data parallelism; each rank has its own GPU.
    patience : float
        Seconds that a server may take to start.

    Raises
    ------
    ServerError
        If a server does not start or does not answer; the message has the end of its log.
    """
    kinds: list[dict[str, str]] = [{}, {"DEVGUARD": "repair"}]
    without, guarded = (_serve(folder, kind, images, tp, dp, patience) for kind in kinds)
    return without, guarded


def make_checkpoint(folder: Path, images: Sequence[bytes]) -> list[str]:
    """Make the model, and return its answer about each image as computed by transformers."""
    _log("making a tiny Qwen2-VL")
    command = [sys.executable, "-m", "tests.sglang.checkpoint", str(folder / "model")]
    for number, image in enumerate(images):
        path = folder / f"{number}.png"
        path.write_bytes(image)
        command.append(str(path))
    done = subprocess.run(command, env=_environment(folder, 1), cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise ServerError(f"the model could not be made:\n{done.stderr}")
    texts: list[str] = json.loads(done.stdout.splitlines()[-1])
    return texts


def _environment(folder: Path, gpus: int) -> dict[str, str]:
    """Return the environment of a server, with the changes of server_plugin.py to SGLang and no other plugin."""
    environment = sglang_environment(gpus, folder=folder)
    declared = folder / "plugin" / "devguard_server_test-0.dist-info"
    declared.mkdir(parents=True, exist_ok=True)
    (declared / "METADATA").write_text("Metadata-Version: 2.1\nName: devguard-server-test\nVersion: 0\n")
    (declared / "entry_points.txt").write_text(
        f"[sglang.srt.plugins]\n{server_plugin.NAME} = tests.sglang.server_plugin:plugin\n"
    )
    environment["PYTHONPATH"] += os.pathsep + str(declared.parent)
    environment["SGLANG_PLUGINS"] = server_plugin.NAME  # Only this plugin, not devguard's.
    cores = sorted(os.sched_getaffinity(0))
    environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[k % len(cores)]) for k in range(gpus))
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), HOST)
    return environment


def _serve(folder: Path, extra: dict[str, str], images: Sequence[bytes], tp: int, dp: int, patience: float) -> Served:
    name = f"tp{tp}-dp{dp}-" + ("guarded" if extra else "unguarded")
    environment = _environment(folder, tp * dp) | extra
    log = folder / f"{name}.log"
    start = time.monotonic()
    with _server(folder / "model", environment, log, tp, dp) as (process, port):
        _log(f"{name}: starting")
        _wait_until_ready(process, port, log, start + patience)
        seconds = time.monotonic() - start
        _log(f"{name}: ready after {seconds:.0f} s, sending {len(images)} images")
        try:
            answers = tuple(questions.ask(port, image) for image in images)
        except OSError as error:
            raise ServerError(f"the server did not answer ({error}); {_end_of(log)}") from error
        holdings = _holdings(process.pid, Path(environment["DEVGUARD_SIM_STATE"]), tp)
    log_lines = tuple(
        line for line in log.read_text(errors="replace").splitlines() if "devguard: " in line or "devguard is" in line
    )
    return Served(answers, holdings, seconds, log_lines)


@contextlib.contextmanager
def _server(
    model: Path, environment: dict[str, str], log: Path, tp: int, dp: int
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start a server in its own process group, and end the whole group on exit, also after an error."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    words = [word for pair in ARGUMENTS.items() for word in pair if word is not None]
    words += ["--model-path", str(model), "--port", str(port), "--tp", str(tp), "--dp", str(dp)]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang.launch_server", *words],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, port
    finally:
        shared = _shared_memory(process.pid)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # The group exists as long as any of its processes.
        process.wait()
        for path in shared:  # SGLang kills its schedulers, which leaves the files of their queues.
            path.unlink(missing_ok=True)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path, until: float) -> None:
    while time.monotonic() < until:
        if process.poll() is not None:
            raise ServerError(f"the server ended with {process.returncode} before it was ready; {_end_of(log)}")
        with contextlib.suppress(OSError), questions.WITHOUT_PROXY.open(f"http://{HOST}:{port}/v1/models", timeout=10):
            return
        time.sleep(0.5)
    raise ServerError(f"the server was not ready in time; {_end_of(log)}")


def _end_of(log: Path) -> str:
    return f"the end of {log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:])


def _holdings(leader: int, state: Path, tp: int) -> tuple[Holding, ...]:
    """Return every process of the server, also ended ones; of Python's helpers only those that hold something."""
    found = []
    states = {process.pid: process for process in simgpu.state(state)}
    for pid in sorted(_group(leader) | set(states)):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            title = states[pid].name if pid in states else ""
        name, owner = placement.role(title, leader=pid == leader, tp=tp)
        one = Holding(pid, name, owner, states[pid].devices if pid in states else ())
        if name != placement.HELPER or any(one.on(device.index) for device in one.devices):
            found.append(one)
    return tuple(sorted(found, key=lambda one: (one.owner is None, one.role != placement.TOKENIZER, one.role)))


def _group(leader: int) -> set[int]:
    """Return the live processes of a process group."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getpgid(int(entry.name)) == leader:
                found.add(int(entry.name))
    return found


def _shared_memory(leader: int) -> set[Path]:
    """Return the files of shared memory that the processes of a group have mapped."""
    found = set()
    for pid in _group(leader):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                _, _, name = line.partition("/dev/shm/")
                if name and not name.endswith(" (deleted)"):
                    found.add(Path("/dev/shm", name))
    return found


def _log(text: str) -> None:
    print(f"server: {text}", file=sys.stderr, flush=True)


def _report(title: str, alone: Sequence[str], without: Served, guarded: Served, gpus: int, found: Sequence[str]) -> str:
    apart = max(
        (
            abs(a - b)
            for one, other in zip(without.answers, guarded.answers, strict=True)
            for a, b in zip(one.logprobs, other.logprobs, strict=False)
        ),
        default=0.0,
    )
    lines = [title, "", placement.table(without, guarded, gpus), ""]
    lines += [f"answer {k}: {one.status} {one.text!r}" for k, one in enumerate(guarded.answers)]
    same = sum(text == one.text for text, one in zip(alone, guarded.answers, strict=False))
    lines += [f"transformers, without SGLang, gives the same answer to {same} of {len(guarded.answers)}"]
    lines += [f"largest difference of a token's log-probability with and without devguard: {apart:.1e}"]
    lines += ["from the server's log:", *(line.partition(", doors ")[0] for line in guarded.log_lines)]
    lines += ["", *(f"PROBLEM: {one}" for one in found)] if found else ["", "holds"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.sglang.server", description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, metavar="N", help="only tensor parallelism, over N simulated GPUs")
    parser.add_argument("--dp", type=int, metavar="N", help="only data parallelism, over N simulated GPUs")
    parser.add_argument("--json", action="store_true", help="print all observations as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the model, the logs and the state files")
    parser.add_argument(
        "--patience", type=float, default=600, metavar="SECONDS", help="limit of a start (default: 600)"
    )
    parser.add_argument(
        "--transport", choices=("host",), help="compare SGLang's own segments with DEVGUARD_TRANSPORT instead"
    )
    options = parser.parse_args(arguments)
    for ranks in (options.tp, options.dp):
        if ranks is not None and not 2 <= ranks <= 16:
            parser.error(f"{ranks} ranks: the bug needs at least 2, and there are at most 16 simulated GPUs")
    named = [kind for kind in ("tp", "dp") if getattr(options, kind) is not None] or ["tp", "dp"]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # Ends the server with its test.
    folder = Path(tempfile.mkdtemp(prefix="devguard-server-"))
    rows: list[dict[str, Any]] = []
    try:
        for kind in named:
            ranks = getattr(options, kind) or 2
            sizes = {"tp": 1, "dp": 1} | {kind: ranks}
            images = [questions.picture(k) for k in range(2 * ranks)]
            place = folder / f"{kind}{ranks}"
            place.mkdir()
            alone = make_checkpoint(place, images)
            if options.transport:
                from tests.sglang import transport_server

                row = transport_server.compare(place, images, **sizes, patience=options.patience)
                if not options.json:
                    print(transport_server.report(row), end="\n\n", flush=True)
                rows.append(row)
                continue
            without, guarded = compare(place, images, **sizes, patience=options.patience)
            found = placement.problems(without, guarded, **sizes)
            title = f"SGLang server, {kind.upper()}={ranks} on {ranks} simulated GPUs"
            if not options.json:
                print(_report(title, alone, without, guarded, ranks, found), end="\n\n", flush=True)
            both = {"without": dataclasses.asdict(without), "guarded": dataclasses.asdict(guarded)}
            rows.append({**sizes, **both, "transformers": alone, "problems": found})
    except (ServerError, simgpu.SimulationError) as error:
        _log(str(error))
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
        if options.keep:
            _log(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(rows, indent=1))
    return int(any(row["problems"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
