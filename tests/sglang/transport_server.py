"""Compare a real SGLang server that sends images by its own segments and by ``DEVGUARD_TRANSPORT=host``.

``python -m tests.sglang.server --transport host`` starts both servers for each configuration. Each answers the same
images, a request with two samples, and a request that is aborted while its tensors wait for a stopped scheduler. Then
all schedulers are stopped, more images are sent, and one scheduler is killed with SIGKILL, which ends the server. The
command compares the answers with their log-probabilities, and lists what is left in /dev/shm.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.sglang import questions, server, server_plugin
from tests.sglang.checkpoint import PROMPT
from tests.sglang.placement import Answer

__all__ = ["compare", "problems", "report", "Run"]

SHARED = Path("/dev/shm")
LOST = 4  # Requests that wait for a scheduler when it is killed.


@dataclasses.dataclass(frozen=True)
class Run:
    """What one server did."""

    answers: tuple[Answer, ...]
    samples: tuple[str, ...]
    aborted: tuple[int, int]  # The leases, or segments, of a request: while it waits, and after it was aborted.
    waiting: int  # The leases, or segments, when a scheduler was killed.
    left: tuple[int, ...]  # The bytes of each segment that is left after the end of the server.
    usage: dict[str, int] | None  # The last one of the arena.
    seconds: float
    log_lines: tuple[str, ...]


def compare(
    folder: Path, images: Sequence[bytes], *, tp: int = 1, dp: int = 1, patience: float = 600
) -> dict[str, Any]:
    """Run both servers; return what they did, and what is wrong."""
    without = _run(folder, "segments", {}, images, tp, dp, patience)
    host = _run(folder, "host", {"DEVGUARD": "repair", "DEVGUARD_TRANSPORT": "host"}, images, tp, dp, patience)
    return {
        "tp": tp,
        "dp": dp,
        "without": dataclasses.asdict(without),
        "host": dataclasses.asdict(host),
        "problems": problems(without, host),
    }


def problems(without: Run, host: Run) -> list[str]:
    """Return what is wrong with the transport, and what does not show the fault without it."""
    found = []
    for name, run in (("without", without), ("host", host)):
        if not run.answers or any(answer.status != 200 for answer in run.answers):
            found.append(f"{name}: answers {[answer.status for answer in run.answers]}")
    if len({answer.text for answer in without.answers}) < 2:
        found.append("every image had the same answer, so equal answers show nothing")
    if without.answers != host.answers:
        found.append("the answers or their log-probabilities differ")
    if without.samples != host.samples:
        found.append("the samples differ")
    if host.usage is None or not host.usage["puts"]:
        found.append("host: no tensor went through the arena")
    elif host.usage["fallbacks"]:
        found.append(f"host: {host.usage['fallbacks']} tensors went by SGLang's segments")
    if host.aborted[0] < 1 or host.aborted[1] != 0:
        found.append(f"host: an aborted request had {host.aborted[0]} leases, and {host.aborted[1]} after its end")
    for name, run in (("without", without), ("host", host)):
        if not run.waiting:
            found.append(f"{name}: nothing waited for the scheduler that was killed, so its death shows nothing")
    if not without.left:
        found.append("without: no segment was left, so this run does not show the fault")
    if host.left:
        found.append(f"host: {len(host.left)} segments of {sum(host.left):,} bytes are left")
    return found


def report(row: dict[str, Any]) -> str:
    """Return a comparison as text."""
    without, host = row["without"], row["host"]
    apart = [
        abs(a - b)
        for one, other in zip(without["answers"], host["answers"], strict=False)
        for a, b in zip(one["logprobs"], other["logprobs"], strict=False)
    ]
    lines = [f"SGLang server, TP={row['tp']}, DP={row['dp']}: SGLang's segments, and DEVGUARD_TRANSPORT=host", ""]
    lines += [f"answer {k}: {one['status']} {one['text']!r}" for k, one in enumerate(host["answers"])]
    lines += [
        f"samples of one request: {host['samples']}",
        f"largest difference of {len(apart)} log-probabilities: {max(apart, default=0):.1e}",
        f"an aborted request: segments {without['aborted'][0]}, then {without['aborted'][1]}; "
        f"leases {host['aborted'][0]}, then {host['aborted'][1]}",
        f"when a scheduler was killed there waited: {without['waiting']} segments; {host['waiting']} leases",
        f"left in /dev/shm after the end of the server: {len(without['left'])} segments of "
        f"{sum(without['left']):,} bytes; {len(host['left'])} of {sum(host['left']):,} bytes",
        f"the arena: {host['usage']}",
        f"start: {without['seconds']:.0f} s, {host['seconds']:.0f} s",
        "from the server's log:",
        *(line.partition(", doors ")[0] for line in host["log_lines"]),
    ]
    lines += ["", *(f"PROBLEM: {one}" for one in row["problems"])] if row["problems"] else ["", "holds"]
    return "\n".join(lines)


def _run(
    folder: Path, name: str, extra: dict[str, str], images: Sequence[bytes], tp: int, dp: int, patience: float
) -> Run:
    usage = folder / f"{name}.usage"
    environment = server._environment(folder, tp * dp) | extra | {server_plugin.USAGE: str(usage)}
    log = folder / f"{name}.log"
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        process, port = stack.enter_context(server._server(folder / "model", environment, log, tp, dp))
        stack.callback(_remove_segments, process.pid)
        server._log(f"{name}: starting")
        server._wait_until_ready(process, port, log, start + patience)
        seconds = time.monotonic() - start
        server._log(f"{name}: ready after {seconds:.0f} s")
        held = _leases(usage) if extra else _segments(process.pid)
        try:
            answers = tuple(questions.ask(port, image) for image in images)
            samples = _sample(port, images[0])
            aborted = _abort(port, process.pid, images[0], held)
            waiting = _kill(port, process.pid, images, held)
        except OSError as error:
            raise server.ServerError(f"the server did not answer ({error}); {server._end_of(log)}") from error
        last = json.loads(usage.read_text()) if usage.exists() else None
        _wait_for_end(process)
        left = tuple(sorted(path.stat().st_size for path in _paths(process.pid)))
    lines = log.read_text(errors="replace").splitlines()
    ours = tuple(line for line in lines if "devguard: " in line or "devguard is" in line)
    return Run(answers, samples, aborted, waiting, left, last, seconds, ours)


def _paths(pid: int) -> list[Path]:
    return list(SHARED.glob(f"sgl_shm_mm_{pid}_*"))


def _segments(pid: int) -> Callable[[], int]:
    return lambda: len(_paths(pid))


def _leases(usage: Path) -> Callable[[], int]:
    return lambda: int(json.loads(usage.read_text())["leases"]) if usage.exists() else 0


def _remove_segments(pid: int) -> None:
    for path in _paths(pid):
        path.unlink(missing_ok=True)


def _post(port: int, path: str, body: dict[str, Any], timeout: float = 180) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with questions.WITHOUT_PROXY.open(request, timeout=timeout) as reply:
        text = reply.read()
    return json.loads(text) if text.strip() else None


def _question(image: bytes, **values: Any) -> dict[str, Any]:
    data = "data:image/png;base64," + base64.b64encode(image).decode()
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True, **values.pop("sampling", {})}
    return {"text": PROMPT, "image_data": [data], "sampling_params": sampling, **values}


def _sample(port: int, image: bytes) -> tuple[str, ...]:
    """Ask for two samples, which SGLang sends as three requests."""
    return tuple(one["text"] for one in _post(port, "/generate", _question(image, sampling={"n": 2})))


def _schedulers(pid: int) -> list[int]:
    found = []
    for member in server._group(pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{member}/cmdline").read_bytes().startswith(b"sglang::scheduler"):
                found.append(member)
    return sorted(found)


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[list[int]]:
    found = _schedulers(pid)
    if not found:
        raise server.ServerError("the server has no schedulers")
    for one in found:
        os.kill(one, signal.SIGSTOP)
    try:
        yield found
    finally:
        for one in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGCONT)


def _wait(until: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _abort(port: int, pid: int, image: bytes, held: Callable[[], int]) -> tuple[int, int]:
    """Abort a request whose tensors wait for a scheduler; return what it holds, and what is held afterward."""
    _wait(lambda: held() == 0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with _stopped(pid):
            asked = pool.submit(_post, port, "/generate", _question(image, rid="aborted"))
            _wait(lambda: held() > 0)
            before = held()
            _post(port, "/abort_request", {"rid": "aborted"})
        with contextlib.suppress(OSError):
            asked.result(120)
    _wait(lambda: held() == 0)
    return before, held()


def _kill(port: int, pid: int, images: Sequence[bytes], held: Callable[[], int]) -> int:
    """Kill a scheduler for which tensors wait; return how many wait."""
    pool = concurrent.futures.ThreadPoolExecutor(LOST)
    with _stopped(pid) as schedulers:
        for number in range(LOST):
            pool.submit(_post, port, "/generate", _question(images[number % len(images)]), 60)
        _wait(lambda: held() >= LOST)
        waiting = held()
        os.kill(schedulers[-1], signal.SIGKILL)
    pool.shutdown(wait=False, cancel_futures=True)
    return waiting


def _wait_for_end(process: subprocess.Popen[bytes]) -> None:
    """Wait until the server has noticed the death of its scheduler; a hung one is killed, as an operator would."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _wait(lambda: not server._group(process.pid), 20)
