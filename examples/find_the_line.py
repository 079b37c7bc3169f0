"""Find the line that puts work on the wrong GPU: the mode "observe" changes nothing and names every stray line.

devguard sim --gpus 2 -- python examples/find_the_line.py
"""

import io
import pickle
import sys
from pathlib import Path

import torch

import devguard


def receive(message):
    """Load a message from another process."""
    return pickle.loads(message)


def resume(checkpoint):
    """Read a checkpoint."""
    return torch.load(io.BytesIO(checkpoint))


def main():
    """Let two lines stray, then name them."""
    if torch.cuda.device_count() < 2:
        sys.exit("Two GPUs are needed. To simulate them: devguard sim --gpus 2 -- python examples/find_the_line.py")
    with devguard.unguarded():  # Stands for the work of another process.
        tensor = torch.zeros(1024).to("cuda:0")
        message, file = pickle.dumps(tensor), io.BytesIO()
        torch.save(tensor, file)

    with devguard.guard("cuda:1", mode="observe"):
        for _ in range(3):
            receive(message)
        resume(file.getvalue())

    for stray in devguard.strays():
        where = f"{Path(stray.site.file).name}:{stray.site.line} in {stray.site.function}"
        print(f"{where}: {stray.count} x, {stray.bytes} bytes on {stray.target}, owner {stray.owner}")
        print(f"    {stray.site.source}")


if __name__ == "__main__":
    main()
