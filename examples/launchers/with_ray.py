"""Ray passes DEVGUARD to its workers; each sees one GPU as its cuda:0, whatever index the sender used.

python examples/launchers/with_ray.py
"""

import ray
import torch


@ray.remote(num_gpus=1)
class Worker:
    """Owns one of two GPUs."""

    def receive(self, batch):
        """Return where `batch` is, which the driver made on its cuda:1."""
        return f"actor on GPU {ray.get_gpu_ids()[0]}: batch on {batch.device}"


@ray.remote(num_gpus=1)
def task(batch):
    """Do the same in a task."""
    return f"task: batch on {batch.device}"


def main():
    """Send one batch to an actor on each GPU, then to a task."""
    ray.init(num_cpus=2, num_gpus=2, runtime_env={"env_vars": {"DEVGUARD": "repair"}}, log_to_driver=False)
    batch = ray.put(torch.ones(3).to("cuda:1"))
    workers = [Worker.remote() for _ in range(2)]
    print(*sorted(ray.get([worker.receive.remote(batch) for worker in workers])), sep="\n")
    ray.kill(workers.pop())
    print(ray.get(task.remote(batch)))
    ray.shutdown()


if __name__ == "__main__":
    main()
