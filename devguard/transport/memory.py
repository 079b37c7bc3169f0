"""Memory that processes share: a sealed, anonymous file (memfd), and maps of it.

It has no name, so that it leaves nothing behind: the kernel frees it when the last descriptor and the last map are
gone, also after SIGKILL. It is sealed after its maker has mapped it: no process can shrink it, which would kill the
others with SIGBUS, and no reader can write to it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any

from devguard.errors import DevGuardError

__all__ = ["explain", "is_full", "Mapping", "Memory", "MORE_ROOM"]

MORE_ROOM = "Raise `ulimit -n`, or close files."

_ADD_SEALS = 1033
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_FUTURE_WRITE = 0x1, 0x2, 0x4, 0x10  # the last one: Linux 5.1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MADV_DONTNEED = 4
_FAILED = ctypes.c_void_p(-1).value


class Mapping:
    """A map of a range of memory. It owns the addresses, and gives them back with its last buffer."""

    __slots__ = ("address", "before_unmap", "nbytes")

    def __init__(self, descriptor: int, nbytes: int, offset: int, protection: int, flags: int) -> None:
        self.nbytes = 0
        self.before_unmap: Callable[[], object] | None = None
        address = _libc.mmap(None, nbytes, protection, flags, descriptor, offset)
        if address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot map {nbytes:,} bytes: {os.strerror(number)}")
        self.address: int = address
        self.nbytes = nbytes

    def buffer(self, offset: int = 0, nbytes: int | None = None, keep: object = None) -> memoryview:
        """Return the bytes of a part of the map, which keep the map, and `keep`, which lives as long as they.

        Writing to them needs a map that allows it.
        """
        size = self.nbytes - offset if nbytes is None else nbytes
        if not 0 <= offset <= offset + size <= self.nbytes:
            raise ValueError(f"bytes {offset} to {offset + size} do not lie in a map of {self.nbytes} bytes")
        array: Any = (ctypes.c_ubyte * size).from_address(self.address + offset)
        array.kept = self, keep
        return memoryview(array).cast("B")

    def __del__(self) -> None:
        if self.nbytes:
            if self.before_unmap is not None:
                self.before_unmap()
            _libc.munmap(self.address, self.nbytes)


class PrivateMap:
    """A private map of a whole memory. Its pages stay mapped, because mapping them takes longer than reading them.

    Writes stay in the map, and are dropped when the last buffer of their range is gone.
    """

    __slots__ = ("_mapping", "_used")

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self._used: set[tuple[int, int]] = set()  # the ranges that buffers can still reach

    def take(self, offset: int, nbytes: int) -> tuple[memoryview, Use] | None:
        """Return the bytes of a range that starts at a page; None if a buffer of an earlier use of it is left."""
        last = offset + nbytes
        if any(start < last and offset < end for start, end in tuple(self._used)):
            return None
        self._used.add((offset, last))
        use = Use(lambda: self._give_back(offset, nbytes))
        return self._mapping.buffer(offset, nbytes, use), use

    def _give_back(self, offset: int, nbytes: int) -> None:
        """End a use of a range. Called by a finalizer, so it takes no lock."""
        address = self._mapping.address + offset
        if not _is_written(address, nbytes) or _libc.madvise(address, nbytes, _MADV_DONTNEED) == 0:
            self._used.discard((offset, offset + nbytes))


class Use:
    """One use of a range, which ends with its last buffer.

    Attributes
    ----------
    at_end : callable or None
        Called then, by a finalizer.
    """

    __slots__ = ("_give_back", "at_end")

    def __init__(self, give_back: Callable[[], object] | None = None) -> None:
        self._give_back = give_back
        self.at_end: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self._give_back is not None and not sys.is_finalizing():
            self._give_back()
        if self.at_end is not None:
            self.at_end()


_ENTRY = 8  # bytes of /proc/self/pagemap for each page
_HIGHEST = 7 if sys.byteorder == "little" else 0
_ENTRIES = 1 << 15  # bytes to read at once: the entries of 16 MiB
_THERE, _OF_FILE = 0xC0, 0x20  # in the highest byte of an entry: present or swapped; not a copy of this process
_UNWRITTEN = bytes(byte for byte in range(256) if not byte & _THERE or byte & _OF_FILE)


def _is_written(address: int, nbytes: int) -> bool:
    """Return whether a page of a private map has been written to, and so is a copy; True if that is not known."""
    position = address // mmap.PAGESIZE * _ENTRY
    last = -(-(address + nbytes) // mmap.PAGESIZE) * _ENTRY
    try:
        pages = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)  # each time: a forked child has other pages
    except OSError:
        return True
    try:
        while position < last:
            entries = os.pread(pages, min(_ENTRIES, last - position), position)
            if not entries or entries[_HIGHEST::_ENTRY].translate(None, _UNWRITTEN):
                return True
            position += len(entries)
    except OSError:
        return True
    finally:
        os.close(pages)
    return False


class Memory:
    """A sealed memfd. It owns its descriptor.

    Parameters
    ----------
    descriptor : int
        The memfd.
    nbytes : int
        Its size.
    """

    __slots__ = ("_private", "descriptor", "nbytes")

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self.descriptor = descriptor
        self.nbytes = nbytes
        self._private: PrivateMap | None = None

    @classmethod
    def make(cls, nbytes: int) -> tuple[Memory, Mapping]:
        """Make memory; return it and the only map through which it can be written.

        Raises
        ------
        DevGuardError
            The system has no room for it, no descriptor, or is not Linux 5.1 or later.
        """
        try:
            descriptor = os.memfd_create("devguard-transport", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            memory = cls(descriptor, nbytes)
            os.ftruncate(descriptor, nbytes)
            mapping = Mapping(descriptor, nbytes, 0, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED)
            fcntl.fcntl(descriptor, _ADD_SEALS, _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW | _SEAL_FUTURE_WRITE)
        except (OSError, AttributeError) as error:
            raise DevGuardError(f"cannot make {nbytes:,} bytes of shared memory: {explain(error)}") from error
        return memory, mapping

    def map(self) -> Mapping:
        """Map all of it, to read; the maker's later writes are seen."""
        return Mapping(self.descriptor, self.nbytes, 0, mmap.PROT_READ, mmap.MAP_SHARED)

    def map_privately(self, offset: int, nbytes: int) -> Mapping:
        """Map a range, from the start of a page; writes to the map stay in it."""
        return Mapping(self.descriptor, nbytes, offset, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE)

    def view(self, offset: int, nbytes: int) -> tuple[memoryview, Use]:
        """Return the bytes of a range that starts at a page, and their use; writes to them stay in this view."""
        if self._private is None:
            self._private = PrivateMap(self.map_privately(0, self.nbytes))
        taken = self._private.take(offset, nbytes)
        if taken is not None:
            return taken
        use = Use()
        return self.map_privately(offset, nbytes).buffer(keep=use), use

    def close(self) -> None:
        """Close the descriptor; maps stay."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


def is_full(error: Exception) -> bool:
    """Return whether there was no room for another file descriptor."""
    return getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)


def explain(error: Exception) -> str:
    """Return what the system says, and what to do."""
    number = getattr(error, "errno", None)
    if isinstance(error, AttributeError):
        return f"{error}. Transport needs Linux 5.1 or later."
    if is_full(error):
        return f"{error}. {MORE_ROOM}"
    if number == errno.EINVAL:
        return f"{error}. Transport needs Linux 5.1 or later."
    return str(error)
