"""A program without devguard in it: each of vLLM's workers owns the GPU that it chose.

DEVGUARD=repair VLLM_ALLOW_INSECURE_SERIALIZATION=1 python examples/launchers/with_vllm.py MODEL
(vLLM requires the second variable because the program sends a function to the workers.)
"""

import pickle
import sys

import torch
from vllm import LLM


def receive(worker, message):
    """Return where the batch in `message` is, which was made on cuda:0."""
    return f"worker {worker.rank}: batch on {pickle.loads(message).device}"


def main():
    """Send a batch that was made on cuda:0 to two tensor-parallel workers."""
    llm = LLM(model=sys.argv[1], tensor_parallel_size=2)
    message = pickle.dumps(torch.ones(3).to("cuda:0"))
    print(*llm.collective_rpc(receive, args=(message,)), sep="\n")


if __name__ == "__main__":
    main()
