"""The guard as a context manager, with remap() for raw buffers and no_strays() for tests.

devguard sim --gpus 2 -- python examples/context_manager.py
"""

import io
import sys

import torch

import devguard


def saved_elsewhere():
    """Make a checkpoint with the tag cuda:7, like a file from a machine with more GPUs."""
    file = io.BytesIO()
    torch.save({"weight": torch.tensor([1.0, 2.0])}, file, _use_new_zipfile_serialization=False)
    tag = b"X\x03\x00\x00\x00cpu"
    return io.BytesIO(file.getvalue().replace(tag, b"X\x06\x00\x00\x00cuda:7"))


def main():
    """Show each scope in turn."""
    if torch.cuda.device_count() < 2:
        sys.exit("Two GPUs are needed. To simulate them: devguard sim --gpus 2 -- python examples/context_manager.py")

    with devguard.guard("cuda:1"):
        print("current device:", torch.cuda.current_device())
        weight = torch.load(saved_elsewhere())["weight"]
        print("torch.load, no map_location:", weight.device, weight.cpu().tolist())
        weight = torch.load(saved_elsewhere(), map_location="cpu")["weight"]
        print("an explicit map_location wins:", weight.device)

        raw = bytearray(b"\x01\x02\x03")
        print("torch.frombuffer:", torch.frombuffer(raw, dtype=torch.uint8).device)
        with devguard.remap():
            print("torch.frombuffer in remap():", torch.frombuffer(raw, dtype=torch.uint8).device)

        try:
            with devguard.no_strays():
                torch.load(saved_elsewhere())
        except devguard.StrayDeviceError as error:
            print("no_strays() raised", type(error).__name__)

    held = ", ".join(str(device) for device in devguard.contexts())
    print("contexts of this process:", held)


if __name__ == "__main__":
    main()
