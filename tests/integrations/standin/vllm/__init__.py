"""A stand-in for vLLM without a model: it sends a function to workers in separate processes."""

import multiprocessing


class LLM:
    """Like vllm.LLM, but only with `collective_rpc`."""

    def __init__(self, model, tensor_parallel_size=1):
        self.size = tensor_parallel_size

    def collective_rpc(self, method, args=()):
        """Call ``method(worker, *args)`` in each worker."""
        spawn = multiprocessing.get_context("spawn")
        kwargs = [{"local_rank": rank, "rank": rank, "shift": 0} for rank in range(self.size)]
        with spawn.Pool(self.size, maxtasksperchild=1) as pool:
            calls = [pool.apply_async(_work, (rank, kwargs, method, args)) for rank in range(self.size)]
            return [call.get() for call in calls]


def _work(rank, kwargs, method, args):
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    wrapper = WorkerWrapperBase(rank)
    wrapper.init_worker(kwargs)
    wrapper.init_device()
    return method(wrapper.worker, *args)
