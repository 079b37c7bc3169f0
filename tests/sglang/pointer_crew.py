"""Send tensors by SGLang 0.5.23's own ``ShmPointerMMData``, in both backings: ``python -m tests.sglang.pointer_crew``.

A tokenizer (SGLang's class, without its sockets) wraps the tensors of requests and pickles them, a router decodes and
encodes the messages, and ranks materialize them. The command prints one JSON object, a key for each case. The processes
are forked from one that has imported SGLang. ``DEVGUARD_TRANSPORT=host`` in the environment gives the second backing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import statistics
import sys
import time
import types
from array import array
from pathlib import Path
from typing import Any

import msgspec
import sglang.srt.managers.tokenizer_manager as tokenizers
import torch
from sglang.srt.managers import io_struct, mm_utils
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
from sglang.srt.runtime_context import publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import msgpack_utils

import devguard
from devguard.integrations import sglang
from devguard.integrations.sglang import shm_pointer
from devguard.transport import reading

torch.set_num_threads(1)  # A forked process has none of the threads of its parent.
CONTEXT = multiprocessing.get_context("fork")
Pointer = mm_utils.ShmPointerMMData
SHARED = Path("/dev/shm")


class Nothing:
    """SGLang's transports between GPUs, which have nothing to do here."""

    async def prepare_for_dispatch_async(self, inputs: Any) -> list[Any]:
        return []

    def prepare_for_dispatch(self, inputs: Any) -> list[Any]:
        return []

    def cancel_for_dispatch(self, prepared: Any) -> None:
        pass


class Tokenizer(tokenizers.TokenizerManager):
    """SGLang's tokenizer, with its table of requests and its way of sending, and a list for a socket."""

    def __init__(self) -> None:
        self.init_running_status()
        self.cuda_vmm_feature_transport = self.positional_embeds_transport = Nothing()
        self.sent: list[bytes] = []
        self.fails = False

    def _dispatch_to_scheduler(self, message: Any) -> None:
        if self.fails:
            raise ConnectionError("the scheduler is gone")
        self.sent.append(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def send(self, *tensors: Any, rid: str = "one") -> bytes:
        """Send a request with these tensors; return the message."""
        stats = APIServerReqTimeStats(disagg_mode=None)
        self.rid_to_state[rid] = types.SimpleNamespace(dispatched=False)
        items = [MultimodalDataItem(modality=Modality.IMAGE, feature=tensor, hash=7) for tensor in tensors]
        request = io_struct.TokenizedGenerateReqInput(
            rid=rid, input_text="", input_ids=array("q", [1]), input_embeds=None,
            mm_inputs=MultimodalProcessorOutput(mm_items=items), token_type_ids=None, sampling_params=SamplingParams(),
            return_logprob=False, logprob_start_len=-1, top_logprobs_num=0, token_ids_logprob=None, stream=False,
        )  # fmt: skip
        request.time_stats = stats
        asyncio.run(self._send_one_request(request))
        return self.sent[-1]


def features(message: bytes) -> list[Any]:
    return [item.feature for item in pickle.loads(message).mm_inputs.mm_items]


def route(message: bytes) -> bytes:
    """Decode and encode a message, by pickle and by SGLang's msgpack."""
    decoded = pickle.loads(message)
    decoder = msgspec.msgpack.Decoder(dec_hook=msgpack_utils.dec_hook, ext_hook=msgpack_utils.ext_hook)
    for item in decoded.mm_inputs.mm_items:
        item.feature = decoder.decode(io_struct._msgpack_encoder.encode(item.feature))
    return pickle.dumps(decoded, pickle.HIGHEST_PROTOCOL)


def fingerprint(tensor: torch.Tensor) -> list[Any]:
    data = tensor.contiguous().view(-1).view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(data.numpy().tobytes()).hexdigest()]


def names(message: bytes) -> list[str]:
    return ["arena" if feature.shm_name.startswith(shm_pointer.PREFIX) else "segment" for feature in features(message)]


def segments() -> set[str]:
    return {path.name for path in SHARED.glob("sgl_shm_mm_*")}


# ---- other processes


def answer(pipe: Any, do: Any) -> None:
    """Answer messages until the pipe closes; ``do`` keeps what it returns besides the answer."""
    kept: list[Any] = []
    with contextlib.suppress(EOFError):
        while True:
            message = pipe.recv()
            try:
                pipe.send(do(message, kept))
            except Exception as error:  # noqa: BLE001 - the answer
                pipe.send(f"{type(error).__name__}: {error}")
    os._exit(0)


def router(message: bytes, kept: list[Any]) -> Any:
    onward = route(message)
    return onward, len(reading._hub.readers)


def rank(message: Any, kept: list[Any]) -> Any:
    """Materialize a message's tensors and keep them; or ``drop`` them, ``discard`` or ``write`` to them."""
    order, message = message if isinstance(message, tuple) else ("keep", message)
    if order == "drop":
        kept.clear()
        return None
    found = pickle.loads(message)
    if order == "discard":
        mm_utils.discard_shm_features(found)
        return None
    tensors = [item.feature for item in mm_utils.unwrap_shm_features(found).mm_inputs.mm_items]
    kept += tensors
    if order == "write":
        for tensor in tensors:
            tensor.zero_()
    return [fingerprint(tensor) for tensor in tensors]


class Peer:
    """A process that answers."""

    def __init__(self, do: Any) -> None:
        self.pipe, end = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=answer, args=(end, do), daemon=True)
        self.process.start()
        end.close()

    def ask(self, message: Any) -> Any:
        self.pipe.send(message)
        if not self.pipe.poll(60):
            raise TimeoutError("no answer")
        return self.pipe.recv()

    def kill(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()


def settle(leases: int = 0) -> dict[str, int] | None:
    """Wait until the arena holds so many leases; return its usage."""
    until = time.monotonic() + 10
    while True:
        found = sglang.transport_usage()
        if found is None or found["leases"] == leases or time.monotonic() > until:
            return found
        time.sleep(0.001)


# ---- the cases


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    large = torch.randn(3, 64, 1024)
    of_arena = {"scalar": torch.tensor(3.0), "empty": torch.ones(0, 3)}  # SGLang's segments refuse both
    return {
        "float32": large,
        "part": large[1, 3:],
        "transposed": large.transpose(0, 2),
        "bfloat16": large.bfloat16(),
        "int64": torch.arange(1 << 15),
        "bool": large > 0,
        "small": torch.arange(5.0),
        "needs grad": large.clone().requires_grad_().detach(),
        **(of_arena if os.environ.get("DEVGUARD_TRANSPORT") else {}),
    }


def equal_on_every_rank() -> Any:
    tokenizer, hop, ranks = Tokenizer(), Peer(router), [Peer(rank), Peer(rank)]
    made = tensors()
    onward, connections = hop.ask(tokenizer.send(*made.values()))
    expected = [fingerprint(tensor) for tensor in made.values()]
    onward, _ = hop.ask(onward)
    if "arena" in names(onward):
        equal = [one.ask(onward) == expected for one in ranks]
    else:  # SGLang's ranks have opened a segment before the first of them unlinks it
        found = [pickle.loads(onward) for _ in ranks]
        got = [[item.feature for item in mm_utils.unwrap_shm_features(one).mm_inputs.mm_items] for one in found]
        equal = [[fingerprint(tensor) for tensor in one] == expected for one in got]
    held = sglang.transport_usage()
    for one in ranks:
        one.ask(("drop", b""))
    return {
        "equal": equal,
        "names": sorted(set(names(onward))),
        "length": max(len(feature.shm_name) for feature in features(onward) if feature.shape.numel() > 1 << 17),
        "hash": [feature.precomputed_hash for feature in features(onward)][:2],
        "connections of the router": connections,
        "held": held and held["in_use"] > 0,
        "after": settle(),
    }


def writes_stay_local() -> Any:
    tokenizer, ranks = Tokenizer(), [Peer(rank), Peer(rank)]
    made = torch.ones(1 << 16)
    message = tokenizer.send(made)
    ranks[0].ask(("write", message))
    unchanged = ranks[1].ask(message) == [fingerprint(made)]
    for one in ranks:
        one.ask(("drop", b""))
    return {"unchanged": unchanged, "after": settle()}


def parallel_samples() -> Any:
    """SGLang sends a request with n samples as n + 1 requests that share the tensors."""
    tokenizer, ranks = Tokenizer(), [Peer(rank), Peer(rank)]
    made = torch.ones(1 << 16)
    messages = {f"{k}": tokenizer.send(made, rid=f"{k}") for k in range(4)}
    leases = settle(4)
    equal = all(one.ask(message) == [fingerprint(made)] for message in messages.values() for one in ranks)
    for one in ranks:
        one.ask(("drop", b""))
    ended = settle()
    for rid in messages:
        del tokenizer.rid_to_state[rid]
    return {"leases": leases, "equal": equal, "ended": ended}


def forgotten_requests() -> Any:
    """Requests that no rank reads: each way in which the tokenizer forgets one."""
    found = {}
    for way in ("del", "pop", "pop with default", "clear"):
        tokenizer = Tokenizer()
        tokenizer.send(torch.ones(1 << 16), torch.ones(4), rid="a")
        before = settle(2)
        table = tokenizer.rid_to_state
        if way == "del":
            del table["a"]
        elif way == "clear":
            table.clear()
        else:
            assert table.pop("a", *([None] if way == "pop with default" else [])) is not None
        found[way] = [before and before["leases"], settle()]
        assert table.pop("a", None) is None
    return found


def forgotten_while_read() -> Any:
    """A rank that has the tensor keeps it; a late one is refused, as SGLang's agreement about failures expects."""
    tokenizer, early, late = Tokenizer(), Peer(rank), Peer(rank)
    message = tokenizer.send(torch.ones(1 << 16))
    early.ask(message)
    del tokenizer.rid_to_state["one"]
    time.sleep(0.1)
    refused, held = late.ask(message), sglang.transport_usage()
    early.ask(("drop", b""))
    return {"late": refused[:14], "held": held and held["leases"], "after": settle()}


def discarded() -> Any:
    """One rank fails, and SGLang discards its tensors: the lease ends, although the request lives on."""
    tokenizer, ranks = Tokenizer(), [Peer(rank), Peer(rank)]
    message = tokenizer.send(torch.ones(1 << 16))
    ranks[0].ask(message)
    ranks[0].ask(("drop", b""))
    ranks[1].ask(("discard", message))
    return settle()


def not_dispatched() -> Any:
    """The message is not sent: the handler of the failure forgets the request."""
    tokenizer = Tokenizer()
    tokenizer.fails = True
    with contextlib.suppress(ConnectionError):
        tokenizer.send(torch.ones(1 << 16))
    tokenizer._release_lora_once = lambda state: None
    tokenizer._release_req_states_on_failure({"one": tokenizer.rid_to_state["one"]})
    return settle()


def full_budget() -> Any:
    """The budget has room for one tensor: the others travel in SGLang's segments, and so does one that is larger."""
    tokenizer, ranks = Tokenizer(), [Peer(rank), Peer(rank)]
    before = segments()
    made = [torch.full((3 << 18,), float(k)) for k in range(3)] + [torch.ones(5 << 20)]
    start = time.monotonic()
    message = tokenizer.send(*made)
    seconds = time.monotonic() - start
    new = segments() - before
    usage = sglang.transport_usage()
    kinds = names(message)
    # One rank reads all, as with TP=1, because SGLang's segments are unlinked by the first.
    equal = ranks[0].ask(message) == [fingerprint(tensor) for tensor in made]
    del tokenizer.rid_to_state["one"]
    ranks[0].ask(("drop", b""))
    return {
        "names": kinds, "segments": len(new), "equal": equal, "fallbacks": usage and usage["fallbacks"],
        "seconds": seconds, "after": settle(), "left": len(segments() - before),
    }  # fmt: skip


def killed_rank() -> Any:
    """A rank dies with SIGKILL before it opens its tensors, and one after."""
    tokenizer, before = Tokenizer(), segments()
    inside, outside = Peer(rank), Peer(rank)
    message = tokenizer.send(torch.ones(1 << 16))
    tokenizer.send(torch.ones(1 << 16), rid="two")
    inside.ask(message)
    inside.kill()
    outside.kill()
    left = sorted(segments() - before)
    for rid in ("one", "two"):
        del tokenizer.rid_to_state[rid]
    for name in left:
        (SHARED / name).unlink()
    return {"left": len(left), "after": settle()}


def without_a_request() -> Any:
    """An object that no request sends is SGLang's own."""
    made = Pointer(torch.ones(1 << 16))
    kind = "arena" if made.shm_name.startswith(shm_pointer.PREFIX) else "segment"
    mm_utils._discard_tensor_or_list(made)
    return kind


def cost() -> Any:
    """The medians of sends and reads of one tensor, in milliseconds, by MiB; the rank reads every byte. By request."""
    found = {}
    for mib in (1, 19, 64):
        tokenizer, reader = Tokenizer(), Peer(clocked)
        made = torch.ones(mib << 18)
        sends, reads = [], []
        for _ in range(20):
            start = time.perf_counter()
            message = tokenizer.send(made)
            sends.append(time.perf_counter() - start)
            reads.append(reader.ask(message))
            del tokenizer.rid_to_state["one"]
        found[mib] = [round(1e3 * statistics.median(one[3:]), 2) for one in (sends, reads)]
    return found


def clocked(message: Any, kept: list[Any]) -> Any:
    start = time.perf_counter()
    found = mm_utils.unwrap_shm_features(pickle.loads(message)).mm_inputs.mm_items[0].feature
    assert found.sum() == found.numel()
    return time.perf_counter() - start


def uninstalled() -> Any:
    """The last case: everything is restored, and what is in flight is kept until its request is forgotten."""
    tokenizer, reader = Tokenizer(), Peer(rank)
    message = tokenizer.send(torch.ones(1 << 16))
    left = devguard.uninstall()
    read = reader.ask(message)
    sent = names(tokenizer.send(torch.ones(1 << 16), rid="two"))
    mm_utils.discard_shm_features(pickle.loads(tokenizer.sent[-1]))
    kinds = (Pointer, tokenizers.TokenizerManager)
    patched = [name for kind in kinds for name, value in vars(kind).items() if is_ours(value)]
    return {"left": left, "read": len(read), "sent": sent, "patched": patched, "usage": sglang.transport_usage()}


def is_ours(function: Any) -> bool:
    return "/devguard/integrations/" in getattr(getattr(function, "__code__", None), "co_filename", "")


def main() -> None:
    publish(ServerArgs(model_path="dummy", device="cpu", tp_size=2, skip_tokenizer_init=False), role="tokenizer")
    kinds = (Pointer, tokenizers.TokenizerManager)
    patched = [name for kind in kinds for name, value in vars(kind).items() if is_ours(value)]
    found: dict[str, Any] = {"patched": patched}
    for case in (
        equal_on_every_rank, writes_stay_local, parallel_samples, forgotten_requests, forgotten_while_read, discarded,
        not_dispatched, full_budget, killed_rank, without_a_request, cost, uninstalled,
    ):  # fmt: skip
        if case.__name__ not in sys.argv[1:] and (sys.argv[1:] or case is cost):
            continue
        try:
            found[case.__name__] = case()
        except Exception as error:  # noqa: BLE001 - the finding
            found[case.__name__] = f"{type(error).__name__}: {error}"
    found["status"] = devguard.status()["transport"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
