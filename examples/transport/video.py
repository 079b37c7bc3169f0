"""A video that is larger than the budget flows through it: a put waits until the reader has finished earlier chunks.

python examples/transport/video.py    # no GPU needed
"""

import multiprocessing

import torch

from devguard import transport

CHUNKS = 20


def reader(inbox, answers):
    """Use each chunk in place: the frames are read from shared memory, once."""
    answers.put("ready")
    frames, brightness, samples = 0, 0, 0
    for handle in iter(inbox.get, None):
        with handle.view() as chunk:
            frames += sum(shot.shape[0] for shot in chunk["frames"])
            brightness += sum(int(shot.sum()) for shot in chunk["frames"])
            samples += chunk["audio"].numel()
    answers.put(f"{frames} frames, sum of all pixels {brightness}, {samples} samples of audio")


def main():
    """Send chunks of two shots of four frames each, and their audio."""
    spawn = multiprocessing.get_context("spawn")
    inbox, answers = spawn.SimpleQueue(), spawn.SimpleQueue()
    spawn.Process(target=reader, args=(inbox, answers)).start()
    print("the reader is", answers.get())
    sent = 0
    with transport.Arena("cpu", budget="4MiB") as arena:
        for number in range(CHUNKS):
            shots = [torch.full((4, 3, 180, 320), number, dtype=torch.uint8) for _ in range(2)]
            handle = arena.put({"frames": shots, "audio": torch.zeros(16_000, dtype=torch.int16)})
            sent += handle.nbytes
            inbox.put(handle)
        inbox.put(None)
        print(answers.get())
        print(f"{sent >> 20} MiB went through a budget of {arena.budget >> 20} MiB;", end=" ")
        print(f"no more than that was in use: {arena.usage().peak <= arena.budget}")


if __name__ == "__main__":
    main()
