"""What to write at a line that strays, door by door: for errors, for pytest and for reports.

A door that knows more about a single stray says so in its own error.
"""

from __future__ import annotations

__all__ = ["ADVICE", "advise", "OR_REPAIR"]

# Door -> what to do about its strays. devguard.doors.table names the doors.
ADVICE = {
    "artefacts": (
        "The program was exported there and holds that device as a constant. Export it on the owner's index, or "
        "without an index ('cuda')."
    ),
    "bare_cuda": "safetensors treats 'cuda' as GPU 0. Name the device with its index.",
    "bookkeeping": (
        "This thread has chosen no device, and device 0 holds no context yet. Name the device in the call, or run it "
        "inside devguard.guard(...)."
    ),
    "buffers": "A buffer is in host memory. Move the tensor to the owner.",
    "children": (
        "A worker of a DataLoader opens a GPU. Return CPU tensors from the dataset and its collate_fn, and move them "
        "to the GPU in the process that owns it."
    ),
    "collectives": (
        "The group has no device, so torch guesses one from the rank. Pass device_id= to init_process_group, pass "
        "device_ids=[...] to barrier, or call torch.cuda.set_device on this thread first."
    ),
    "first_touch": (
        "This process owns no GPU. Keep the work on the CPU (without pin_memory, which opens a GPU too), give it to a "
        "process that owns a GPU, or run it inside devguard.guard('cuda:...') or devguard.unguarded()."
    ),
    "interop": (
        "The memory is on that device. Allocate it on the owner's device, or, if this is intended, call from_dlpack "
        "inside devguard.unguarded()."
    ),
    "ipc": "Share memory of this process's own GPU, or send CPU tensors.",
    "jit": "The archive names the device on which it was saved. Pass map_location to torch.jit.load.",
    "load": "The bytes carry the sender's device. Pass map_location, or send CPU tensors.",
    "native": (
        "Put the work on the owner's device, or, if this is intended, run it inside devguard.unguarded(). To find the "
        "call that opens a context that has no line here, use devguard run --trace-contexts."
    ),
    "set_device": (
        "That code changes the current device and returns without restoring it. Use torch.cuda.device(...) as a "
        "context manager there, or restore the device after the call."
    ),
    "streams": (
        "Make the stream or event inside devguard.guard(...), or pass the owner's device. If the other device is "
        "intended, make it inside devguard.unguarded()."
    ),
    "threads": (
        "A new thread starts on device 0. Decorate its function with devguard.guard(...), or give a pool an "
        "initializer that sets the device."
    ),
    "triton": (
        "Triton launches on the current device. Launch inside torch.cuda.device_of(tensor), with all arguments on the "
        "owner; or, if the other device is intended, inside devguard.unguarded()."
    ),
    "visibility": (
        "Give each rank its own GPU: an index counts the devices in CUDA_VISIBLE_DEVICES, not those of the machine. "
        "Set the variable before CUDA is initialised."
    ),
}
OR_REPAIR = "Or let devguard do it (mode='repair')."  # follows in the errors of doors that can
_OTHER = "Put the work on the owner's device, or, if this is intended, run it inside devguard.unguarded()."
_KEPT = (
    "The program names that device itself, so devguard leaves the work there. Name the owner's device; if the other is "
    "intended, devguard.allow(...) permits it."
)
_PLACED = "Nothing to do: devguard started the thread on the owner's device. It may never use a GPU."


def advise(door: str, action: str = "") -> str:
    """Return what to do about the strays of a door; for a door of another release, what is true of all.

    Parameters
    ----------
    door, action : str
        As in `devguard.Stray`.
    """
    if action == "kept":
        return _KEPT
    return _PLACED if action == "placed" else ADVICE.get(door, _OTHER)
