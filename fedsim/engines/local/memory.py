"""Memory that processes share, and records laid out in it.

Tensors travel between a run and its workers through memory that both have mapped: one side writes, the other reads,
nothing goes through a pipe but a few hundred bytes of structure. The memory has no name, so nothing is left behind when
a process is killed, and where the system has ``memfd_create`` it is not bounded by the size of ``/dev/shm``.
"""

import contextlib
import io
import mmap
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; vector instructions give the same bits on aligned and on unaligned rows only by luck


class Shared:
    """A span of anonymous memory behind a file descriptor, which a child process may inherit."""

    def __init__(self, size: int, fd: int | None = None) -> None:
        self.size = max(size, 1)
        self.fd = _anonymous(self.size) if fd is None else fd
        self._map = mmap.mmap(self.fd, self.size)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # at the end of the interpreter anything may be gone
            os.close(self.fd)

    def bytes(self) -> memoryview:
        """The whole span, writable."""
        return memoryview(self._map)


def _anonymous(size: int) -> int:
    """A descriptor of a file without a name."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("fedsim")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    os.set_inheritable(fd, True)
    return fd


def write(record: Any, shared: Shared) -> bytes:
    """Lay a record's tensors and arrays down in shared memory, from its start, and pickle the rest.

    What does not fit any more is pickled with the rest: slower, never wrong. Tensors come back contiguous, those that
    are channels-last with that layout.

    Returns:
        For :func:`read`, in a process that has mapped the same memory.
    """
    file, span = io.BytesIO(), shared.bytes()

    def place(start: int, data: memoryview) -> bool:
        if start + data.nbytes > shared.size:
            return False
        span[start : start + data.nbytes] = data
        return True

    _Writer(file, place).dump(record)
    return file.getvalue()


def size_of(record: Any) -> int:
    """Bytes that :func:`write` would fill."""
    writer = _Writer(io.BytesIO(), lambda start, data: True)
    writer.dump(record)
    return writer.used


def read(data: bytes, shared: Shared, *, copy: bool) -> Any:
    """The record that :func:`write` laid down.

    copy: False gives tensors that lie in the shared memory, valid until somebody writes there again.
    """
    return _Reader(io.BytesIO(data), shared.bytes(), copy).load()


Packed = tuple[bytes, npt.NDArray[np.uint8]]


def packed(record: Any) -> Packed:
    """A record as its structure and one array of all its numbers, for a channel that carries arrays without copying."""
    numbers = torch.empty(size_of(record), dtype=torch.uint8).numpy()  # torch aligns what it allocates, numpy does not
    span, file = numbers.data, io.BytesIO()

    def place(start: int, data: memoryview) -> bool:
        span[start : start + data.nbytes] = data
        return True

    _Writer(file, place).dump(record)
    return file.getvalue(), numbers


def unpacked(sent: Packed, *, copy: bool) -> Any:
    """The record that :func:`packed` made.

    copy: False gives tensors that lie in the array, which may be read-only: nobody must write to them.
    """
    structure, numbers = sent
    if numbers.ctypes.data % ALIGNMENT:
        aligned = torch.empty(len(numbers), dtype=torch.uint8).numpy()
        aligned[:] = numbers
        numbers = aligned
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return _Reader(io.BytesIO(structure), numbers.data, copy).load()


class _Writer(pickle.Pickler):
    """Pickles everything but the numbers of CPU tensors and arrays, for which it keeps where they lie."""

    def __init__(self, file: io.BytesIO, place: Callable[[int, memoryview], bool]) -> None:
        super().__init__(file, protocol=5)
        self._place, self.used = place, 0

    def persistent_id(self, found: Any) -> Any:
        """Where a tensor lies, with what it takes to make it again; None for all that is pickled as usual."""
        if type(found) is np.ndarray and found.dtype.kind in "iufb" and found.size:
            start = self._laid(np.ascontiguousarray(found).reshape(-1).view(np.uint8))
            return None if start is None else ("array", start, found.dtype.str, found.shape)
        if type(found) is not Tensor or found.device.type != "cpu" or found.requires_grad or not found.numel():
            return None
        last = found.ndim == 4 and not found.is_contiguous() and found.is_contiguous(memory_format=torch.channels_last)
        flat = (found.permute(0, 2, 3, 1) if last else found).contiguous().reshape(-1)
        start = self._laid(flat.view(torch.uint8).numpy())
        return None if start is None else ("channels-last" if last else "tensor", start, found.dtype, found.shape)

    def _laid(self, data: np.ndarray[Any, Any]) -> int | None:
        start = -(-self.used // ALIGNMENT) * ALIGNMENT
        if not self._place(start, data.data):
            return None
        self.used = start + data.nbytes
        return start


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, span: memoryview, copy: bool) -> None:
        super().__init__(file)
        self._span, self._copy = span, copy

    def persistent_load(self, found: Any) -> Any:
        """The tensor or array that lies there."""
        kind, start, dtype, shape = found
        count = int(np.prod(shape, dtype=np.int64))
        if kind == "array":
            array = np.frombuffer(self._span, dtype, count, start).reshape(shape)
            return array.copy() if self._copy else array
        flat = torch.frombuffer(self._span, dtype=dtype, count=count, offset=start)
        flat = flat.clone() if self._copy else flat
        if kind == "channels-last":
            n, channels, height, width = shape
            return flat.view(n, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(shape)
