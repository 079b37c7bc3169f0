"""The changes to SGLang for the test of a real server; each docstring gives the reason.

`plugin` is the entry point ``devguard_server_test`` of the group ``sglang.srt.plugins``; server.py declares it in a
separate folder. One change causes the bug. The others let a model with weights on the CPU run although its images
arrive on simulated GPUs, which run no kernels. The changes are the same with and without devguard.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

__all__ = ["NAME", "plugin", "USAGE"]

NAME = "devguard_server_test"
USAGE = "DEVGUARD_TEST_USAGE"  # Names a file: the images stay on the host, and the use of the arena is written there.
PRODUCED = ("pixel_values", "image_grid_thw")  # The image processor's results.


def plugin() -> None:
    """Change SGLang in the process of the tokenizer and in the schedulers; other processes stay unchanged."""
    import setproctitle
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if setproctitle.getproctitle().startswith("sglang::"):
        return  # In the data-parallel controller and the detokenizer, registering a hook would import the models.
    _stand_in_for_vllm()
    register = HookRegistry.register
    usage = os.environ.get(USAGE)
    if usage:
        threading.Thread(target=write_usage, args=(Path(usage),), daemon=True).start()
    else:
        register(
            "sglang.srt.multimodal.processors.base_processor.BaseMultimodalProcessor._call_processor",
            leave_on_gpu_0,
            HookType.AFTER,
        )
    register("sglang.srt.managers.scheduler.configure_scheduler_process", take_gpu, HookType.BEFORE)
    register("sglang.srt.managers.mm_utils.tensor_hash", hash_on_host, HookType.AROUND)
    register(
        "sglang.srt.models.qwen2_vl.Qwen2VLForConditionalGeneration.get_image_feature", images_on_host, HookType.BEFORE
    )


def write_usage(path: Path) -> None:
    """Write what the tokenizer's arena holds, again and again, for the test of the transport."""
    from devguard.integrations.sglang import transport_usage

    while True:
        found = transport_usage()
        if found is not None:
            stage = path.with_suffix(f".{os.getpid()}")
            stage.write_text(json.dumps(found))
            stage.replace(path)
        time.sleep(0.05)


def leave_on_gpu_0(result: Any, *args: Any, **kwargs: Any) -> Any:
    """Cause the bug: leave the tensors of an image on cuda:0 in the tokenizer's process.

    SGLang moves only fields that it lists by name back to the host; each field missing there was one bug report.
    """
    for name in PRODUCED:
        if name in result:
            result[name] = result[name].to("cuda:0")
    return result


def take_gpu(server_args: Any, gpu_id: int, *args: Any, **kwargs: Any) -> None:
    """Make the scheduler's GPU the current device, as on a server with GPUs; SGLang skips it with ``--device cpu``."""
    import torch

    torch.cuda.set_device(gpu_id)


def hash_on_host(original: Any, tensors: Any) -> Any:
    """Hash the same bytes on the host, because SGLang hashes tensors on a GPU with a kernel, which would not run."""
    return original(_on_host(tensors))


def images_on_host(model: Any, items: Any, *args: Any, **kwargs: Any) -> None:
    """Move the images to the CPU, where the weights are. The hook runs long after the images arrived."""
    for item in items:
        item.feature = _on_host(item.feature)
        item.image_grid_thw = _on_host(item.image_grid_thw)


def _on_host(value: Any) -> Any:
    import torch

    if isinstance(value, (list, tuple)):
        return [_on_host(one) for one in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _stand_in_for_vllm() -> None:
    """Provide vLLM's kernel, which SGLang's rotary embedding imports without its own kernels, but never calls."""

    def rotary_embedding(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("expected SGLang's own rotary embedding in torch for the model of this test")

    for name in ("vllm", "vllm._custom_ops"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == "vllm")
        sys.modules[name] = module
    sys.modules["vllm._custom_ops"].rotary_embedding = rotary_embedding  # type: ignore[attr-defined]
