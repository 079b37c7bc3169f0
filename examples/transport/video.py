"""A video that is larger than the budget flows through it: a put waits until the reader has finished earlier chunks.

python examples/transport/video.py    # no GPU needed
"""

import multiprocessing

import torch

from devguard import transport


def reader(inbox):
    frames, samples = 0, 0
    for handle in iter(inbox.get, None):
        with handle.view() as chunk:  # in place, without a copy
            frames += sum(shot.shape[0] for shot in chunk["frames"])
            samples += chunk["audio"].numel()
    print(f"{frames} frames and {samples} samples of audio were read")


if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    inbox, sent = spawn.SimpleQueue(), 0
    process = spawn.Process(target=reader, args=(inbox,))
    with transport.Arena("cpu", budget="4MiB") as arena:
        process.start()
        for number in range(20):
            shots = [torch.full((4, 3, 180, 320), number, dtype=torch.uint8) for _ in range(2)]
            handle = arena.put({"frames": shots, "audio": torch.zeros(16_000, dtype=torch.int16)})
            inbox.put(handle)
            sent += handle.nbytes
        inbox.put(None)
        process.join()
        print(f"{sent >> 20} MiB went through; no more than 4 MiB were in use:", arena.usage().peak <= arena.budget)
