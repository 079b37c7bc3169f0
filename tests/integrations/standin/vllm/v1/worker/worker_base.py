"""A stand-in for vLLM's workers: it loads plugins, makes the worker and chooses its device in vLLM's order."""

import torch


class Worker:
    """Like vllm.v1.worker.gpu_worker.Worker, which shifts its local rank by its data-parallel rank."""

    def __init__(self, local_rank, rank, shift):
        self.local_rank, self.rank, self.shift = local_rank, rank, shift
        self.device = None

    def init_device(self):
        self.device = torch.device(f"cuda:{self.local_rank + self.shift}")
        torch.cuda.set_device(self.device)


class WorkerWrapperBase:
    """Like vllm.v1.worker.worker_base.WorkerWrapperBase."""

    def __init__(self, rpc_rank=0):
        self.rpc_rank = rpc_rank

    def init_worker(self, all_kwargs):
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        self.worker = Worker(**all_kwargs[self.rpc_rank])

    def init_device(self):
        self.worker.init_device()
