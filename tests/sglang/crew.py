"""Run SGLang's processes on simulated GPUs: ``python -m tests.sglang.crew ROAD RANKS``.

A tokenizer makes tensors on cuda:0 and sends them, in every way that SGLang 0.5.23 has, to schedulers (rank r owns
cuda:r+1), to a data-parallel controller, which relays them, and to a detokenizer. The code is SGLang's own: its
broadcast, its sockets, its serializers, its managers' constructors and the first steps of its entry points.

Importing SGLang takes half a minute, so the processes are forked from one that has imported it. CUDA must not be
initialised there, which requires ``PYTORCH_NVML_BASED_CUDA_CHECK=1`` in the environment. The command prints one JSON
object: for each process the devices of its tensors, its contexts, and its bytes on each GPU.

ROAD is what guards the processes; several are separated by commas: ``none``, ``decorator``, ``plugin`` (SGLang's own
loader), or ``environment`` (the effect of ``DEVGUARD`` on the import of torch).
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import sglang.srt.managers.data_parallel_controller as controllers
import sglang.srt.managers.detokenizer_manager as detokenizers
import sglang.srt.managers.scheduler as schedulers
import torch
import torch.distributed as dist
import zmq
from sglang.srt.managers import io_struct
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.utils import common, msgpack_utils, network, patch_torch

import devguard
from devguard import simgpu
from devguard.integrations.sglang import worker

CONTEXT = multiprocessing.get_context("fork")
VALUES = [1.0, 2.0, 3.0, 4.0]


def made() -> torch.Tensor:
    """Return a tensor as an image processor leaves it on GPU 0: 4 KiB."""
    return torch.tensor(VALUES).repeat(256).to("cuda:0")


def arguments() -> ServerArgs:
    return ServerArgs(
        model_path="dummy", device="cpu", tp_size=2, load_balance_method="round_robin", skip_tokenizer_init=True
    )


def ports(folder: Path) -> PortArgs:
    names = {name: f"ipc://{folder}/{name}" for name in PortArgs.__annotations__ if name.endswith("ipc_name")}
    return PortArgs(**names, nccl_port=0, decoupled_spec_ipc_config=None, instance_id=folder.name)


# ---- the sender


def tokenizer(folder: Path, ranks: int, finished: Any) -> None:
    patch_torch.monkey_patch_torch_reductions()
    context = zmq.Context()
    tensor = made()
    names = [*(f"rank{rank}" for rank in range(ranks)), "scheduler_input_ipc_name", "detokenizer_ipc_name"]
    for name in names:
        bind = name == "scheduler_input_ipc_name"  # The tokenizer is the listening end of this socket.
        socket = network.get_zmq_socket(context, zmq.PUSH, f"ipc://{folder}/{name}", bind)
        io_struct.sock_send(socket, {"pixel_values": tensor})
        io_struct.sock_send(
            socket,
            {
                "unpickler": pickle.dumps(tensor),
                "msgpack": io_struct._msgpack_encoder.encode(tensor),
            },
        )
        if name.startswith("rank"):
            socket.send(common.MultiprocessingSerializer.serialize(tensor))
    finished.wait()


# ---- the receivers


def receive(socket: Any) -> dict[str, torch.Tensor]:
    """Receive both messages of the tokenizer."""
    got = {"zmq": io_struct.sock_recv(socket)["pixel_values"]}
    sealed = io_struct.sock_recv(socket)
    got["unpickler"] = common.SafeUnpickler(io.BytesIO(sealed["unpickler"])).load()
    decoder = msgspec.msgpack.Decoder(dec_hook=msgpack_utils.dec_hook, ext_hook=msgpack_utils.ext_hook)
    got["msgpack"] = decoder.decode(sealed["msgpack"])
    return got


def serve(rank: int, ranks: int, folder: Path, reports: Any) -> None:
    """Receive messages as a scheduler does."""
    context = zmq.Context()
    socket = network.get_zmq_socket(context, zmq.PULL, f"ipc://{folder}/rank{rank}", True)
    relayed = network.get_zmq_socket(context, zmq.PULL, f"ipc://{folder}/relayed{rank}", True)
    got = receive(socket)
    got["serializer"] = common.MultiprocessingSerializer.deserialize(socket.recv())  # Weights, for schedulers only.
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    sent = [got["zmq"]] if rank == 0 else []
    got["broadcast"] = common.broadcast_pyobj(sent, rank, dist.group.WORLD)[0]
    if rank < 2:
        passed = common.point_to_point_pyobj([got["zmq"]], rank, dist.group.WORLD, 0, 1)
        got["point to point"] = passed[0] if rank == 1 else got["zmq"]
    if rank == 0:
        got["relayed by zmq"] = io_struct.sock_recv(relayed)
        decoder = msgspec.msgpack.Decoder(dec_hook=msgpack_utils.dec_hook, ext_hook=msgpack_utils.ext_hook)
        got["relayed by msgpack"] = decoder.decode(relayed.recv())
    report(reports, f"scheduler {rank}", got)
    dist.destroy_process_group()


def relay(socket: Any, folder: Path, reports: Any) -> None:
    """Receive messages and send them on, as a data-parallel controller does."""
    got = receive(socket)
    onward = network.get_zmq_socket(zmq.Context(), zmq.PUSH, f"ipc://{folder}/relayed0", False)
    io_struct.sock_send(onward, got["zmq"])
    onward.send(io_struct._msgpack_encoder.encode(got["msgpack"]))
    report(reports, "controller", got)


def report(reports: Any, name: str, got: dict[str, torch.Tensor]) -> None:
    for what, tensor in got.items():
        assert tensor.cpu()[:4].tolist() == VALUES, (name, what, tensor)
    states = [state for state in simgpu.state(os.environ["DEVGUARD_SIM_STATE"]) if state.pid == os.getpid()]
    # Without a state CUDA was not initialised.
    held = [device for state in states for device in state.devices if device.bytes]
    reports.put(
        {
            "name": name,
            "devices": {what: str(tensor.device) for what, tensor in got.items()},
            "contexts": [str(device) for device in devguard.contexts()],
            "bytes": {f"cuda:{device.index}": device.bytes for device in held},
            "owner": str(devguard.owner()),
        }
    )


def load_our_plugin() -> None:
    """Make SGLang's loader load devguard's plugin, as for a user who sets SGLANG_PLUGINS but not DEVGUARD."""
    os.environ["SGLANG_PLUGINS"] = "devguard"
    load_plugins()


# ---- the processes, as SGLang makes them: without a guard, and with the plugin or the environment


def scheduler(road: str, rank: int, ranks: int, folder: Path, reports: Any) -> None:
    gpu_id = rank + 1
    if rank % 2:  # Test both orders of SGLang's own patch and devguard's.
        patch_torch.monkey_patch_torch_reductions()
    if road == "decorator":
        decorated(folder=folder, reports=reports, gpu_id=gpu_id, rank=rank, ranks=ranks)
        return
    if road == "plugin":
        load_our_plugin()
        assert "sglang.srt.managers.scheduler.configure_scheduler_process" in HookRegistry._patched
    placement = schedulers.SpawnRanks(world_rank=rank % 2, dp_rank=None, gpu_id=gpu_id)
    schedulers.publish(arguments(), role="scheduler", ranks=placement)
    schedulers.configure_scheduler_process(arguments(), gpu_id)
    torch.cuda.set_device(gpu_id)  # The scheduler of a GPU server does this next.
    patch_torch.monkey_patch_torch_reductions()
    serve(rank, ranks, folder, reports)


@worker
def decorated(ranks: int, rank: int, gpu_id: int, folder: Path, reports: Any) -> None:
    patch_torch.monkey_patch_torch_reductions()
    serve(rank, ranks, folder, reports)


class Controller(controllers.DataParallelController):
    """A controller that starts no schedulers, because they run already."""

    def launch_dp_schedulers(self, server_args: ServerArgs, port_args: PortArgs) -> None:
        """Launch none."""


def run_data_parallel_controller(road: str, folder: Path, reports: Any) -> None:
    patch_torch.monkey_patch_torch_reductions()
    if road == "plugin":
        load_our_plugin()
    controllers.publish(arguments(), role="dp_controller")
    controllers.configure_logger(arguments())
    controller = Controller(arguments(), ports(folder), schedulers.run_scheduler_process)
    relay(controller.recv_from_tokenizer, folder, reports)


def run_detokenizer(road: str, folder: Path, reports: Any) -> None:
    patch_torch.monkey_patch_torch_reductions()
    if road == "plugin":
        load_our_plugin()
    detokenizers.configure_logger(arguments())
    detokenizers.publish(arguments(), role="detokenizer")
    manager = detokenizers.DetokenizerManager(arguments(), ports(folder))
    report(reports, "detokenizer", receive(manager.recv_from_scheduler))


def crew(road: str, ranks: int, folder: Path) -> dict[str, Any]:
    reports, finished = CONTEXT.Queue(), CONTEXT.Event()
    helpers = [run_data_parallel_controller, run_detokenizer]
    if road == "decorator":
        helpers = [worker(function) for function in helpers]
    processes = [CONTEXT.Process(target=tokenizer, args=(folder, ranks, finished))]
    processes += [CONTEXT.Process(target=scheduler, args=(road, rank, ranks, folder, reports)) for rank in range(ranks)]
    processes += [CONTEXT.Process(target=function, args=(road, folder, reports)) for function in helpers]
    for process in processes:
        process.start()
    rows = []
    try:
        while len(rows) < ranks + 2:
            rows.append(reports.get(timeout=120))
    finally:
        finished.set()
        for process in processes:
            process.join(30)
            process.kill()
    return {row.pop("name"): row for row in rows}


def main() -> None:
    results = {}
    for road in sys.argv[1].split(","):
        with tempfile.TemporaryDirectory(prefix="crew-") as folder:  # Short, because a socket's path has a limit.
            results[road] = crew(road, int(sys.argv[2]), Path(folder))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
