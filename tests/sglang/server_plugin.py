"""What the test of a real server changes in SGLang, each for a reason that is written beside it.

`plugin` is the entry point ``devguard_server_test`` of the group ``sglang.srt.plugins``, which server.py declares in a
folder of its own. One change makes the bug; the others let a model whose weights are on the CPU go on after its images
came on simulated GPUs, which run no kernels. With and without devguard they are the same, and none has to do with it.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

__all__ = ["NAME", "plugin"]

NAME = "devguard_server_test"
PRODUCED = ("pixel_values", "image_grid_thw")  # what an image processor makes of an image


def plugin() -> None:
    """Change SGLang in the process of the tokenizer and in the schedulers; the others stay as they are."""
    import setproctitle
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if setproctitle.getproctitle().startswith("sglang::"):
        return  # the data-parallel controller or the detokenizer: to register a hook there would import the models
    _stand_in_for_vllm()
    register = HookRegistry.register
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


def leave_on_gpu_0(result: Any, *args: Any, **kwargs: Any) -> Any:
    """The bug: the tokenizer's process leaves what it made of an image on cuda:0.

    SGLang moves only what it knows by name back to the host; each field that it forgot was one report.
    """
    for name in PRODUCED:
        if name in result:
            result[name] = result[name].to("cuda:0")
    return result


def take_gpu(server_args: Any, gpu_id: int, *args: Any, **kwargs: Any) -> None:
    """A scheduler of a server on GPUs makes its own GPU the current device; with ``--device cpu`` it does not."""
    import torch

    torch.cuda.set_device(gpu_id)


def hash_on_host(original: Any, tensors: Any) -> Any:
    """SGLang hashes what is on a GPU with a kernel, which would not run; on the host it hashes the same bytes."""
    return original(_on_host(tensors))


def images_on_host(model: Any, items: Any, *args: Any, **kwargs: Any) -> None:
    """The weights are on the CPU, so the images must be there too. This comes long after their arrival."""
    for item in items:
        item.feature = _on_host(item.feature)
        item.image_grid_thw = _on_host(item.image_grid_thw)


def _on_host(value: Any) -> Any:
    import torch

    if isinstance(value, (list, tuple)):
        return [_on_host(one) for one in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _stand_in_for_vllm() -> None:
    """SGLang's rotary embedding imports vLLM's kernel where it finds none of its own, even if it never calls it."""

    def rotary_embedding(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the model of this test is expected to use SGLang's own rotary embedding in torch")

    for name in ("vllm", "vllm._custom_ops"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == "vllm")
        sys.modules[name] = module
    sys.modules["vllm._custom_ops"].rotary_embedding = rotary_embedding  # type: ignore[attr-defined]
