"""Arrays that become bytes only when somebody asks for bytes.

Flower's ``Array`` is bytes in NumPy's file format from the moment it is made, and is parsed again whenever it is read.
Between two apps in one process nobody looks at these bytes. Inside ``lazy_arrays()`` an ``Array`` made of an ndarray or
a tensor keeps a copy of it instead, in an app that knows nothing of it. What an app can see stays the same: ``data``
are the same bytes, ``numpy()`` is a new, writable array, and nothing that is changed afterwards changes the record.
"""

import copy
import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flwr
import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord

MADE_FOR = "1.41."  # versions of Flower; what is swapped below is theirs
STYPE = "numpy.ndarray"

NDArray = npt.NDArray[Any]

_HELD = "_held"  # where a lazy array keeps its copy; nobody outside this file gets hold of it


class LazyArray(Array):
    """An ``Array`` that holds an ndarray of its own until its ``data`` is set."""

    __qualname__ = "Array"  # stands in Flower's object ids, and in what an app prints

    def __copy__(self) -> "LazyArray":
        new = LazyArray.__new__(LazyArray)
        new.__dict__.update(self.__dict__)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)  # where it is unpickled nobody knows this class

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        mine, theirs = ((a.dtype, a.shape, a.stype, a.data) for a in (self, other))
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]  # as Flower has it: it can be changed

    @property
    def data(self) -> bytes:
        """The bytes that Flower's own ``Array`` has from the start."""
        own = self.__dict__
        if "data" not in own:
            own["data"] = _encoded(own[_HELD])
        return bytes(own["data"])  # no copy of what is bytes already

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["data"] = value
        self.__dict__.pop(_HELD, None)

    def numpy(self) -> NDArray:
        """A new array: torch wants to write into it, and so may the app."""
        held = self.__dict__.get(_HELD)
        return super().numpy() if held is None or self.stype != STYPE else _own(held)


def encoded_length(array: Array) -> int:
    """``len(array.data)``, without making it."""
    held = array.__dict__.get(_HELD)
    if held is None or "data" in array.__dict__:
        return len(array.data)
    return _header_length(held.dtype, held.shape, held.flags.fnc) + int(held.nbytes)


@contextmanager
def lazy_arrays() -> Iterator[bool]:
    """Swap the encoding in Flower's ``Array`` for the time of a run in this process. May be nested.

    Flower offers no place for it, so three of its methods are replaced, and put back at the end. Arrays made meanwhile
    stay what they are.

    Yields:
        Whether it was done. A Flower that this was not made for, or whose arrays then differ, encodes as ever.
    """
    before = {(cls, name): cls.__dict__.get(name) for cls, name in _SWAPPED}
    known = flwr.__version__.startswith(MADE_FOR) and None not in before.values()
    try:
        done = known and _swap(_SWAPPED) and _same()
        if not done:
            _swap(before)
            warnings.warn(f"arrays are encoded as Flower {flwr.__version__} does it, which is slower", stacklevel=3)
        yield done
    finally:
        _swap(before)


def _own(values: NDArray) -> NDArray:
    """A copy with the layout that NumPy's file format would give it."""
    return np.array(values, order="F" if values.flags.fnc else "C")


def _encoded(values: NDArray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


_name = functools.lru_cache(maxsize=256)(str)  # of a dtype; NumPy puts it together anew each time


@functools.lru_cache(maxsize=4096)
def _header_length(dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool) -> int:
    buffer = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": fortran, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.tell()


# ---------------------------------------------------------------- what is swapped

_stock_init, _stock_encode = Array.__init__, Array.from_numpy_ndarray


def _init(self: Array, *args: Any, **kwargs: Any) -> None:
    """``Array(...)``: Flower's own takes over all fields of what ``from_numpy_ndarray`` gives; here the class, too."""
    _stock_init(self, *args, **kwargs)
    if _HELD in self.__dict__:
        self.__class__ = LazyArray


def _from_numpy_ndarray(cls: type[Array], ndarray: NDArray) -> Array:
    """``Array.from_numpy_ndarray``, which every other way of encoding ends in."""
    plain = type(ndarray) is np.ndarray and ndarray.dtype.kind in "biufc"  # no objects, which Flower refuses
    if not plain or cls not in (Array, LazyArray):
        return _stock_encode(ndarray)
    held = _own(ndarray)
    held.flags.writeable = False
    new = LazyArray.__new__(LazyArray)
    new.__dict__.update({"dtype": _name(held.dtype), "shape": held.shape, "stype": STYPE, _HELD: held})
    return new


def _from_array_dict(cls: type[ArrayRecord], array_dict: dict[str, Array], *, keep_input: bool = True) -> ArrayRecord:
    """``ArrayRecord.from_array_dict``, which would make bytes of every array."""
    record = ArrayRecord()
    for key, array in array_dict.items():
        lazy = isinstance(array, LazyArray)
        record[key] = copy.copy(array) if lazy else Array(array.dtype, tuple(array.shape), array.stype, array.data)
    if not keep_input:
        array_dict.clear()
    return record


_SWAPPED: dict[tuple[type, str], Any] = {
    (Array, "__init__"): _init,
    (Array, "from_numpy_ndarray"): classmethod(_from_numpy_ndarray),
    (ArrayRecord, "from_array_dict"): classmethod(_from_array_dict),
}


def _swap(methods: dict[tuple[type, str], Any]) -> bool:
    for (cls, name), method in methods.items():
        if method is not None:
            setattr(cls, name, method)
    return True


def _same() -> bool:
    """Whether arrays are lazy now, and what they would be without it."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3).T
    made, record = Array(values), ArrayRecord([values])["0"]
    plain = _stock_encode(values)
    return type(made) is type(record) is LazyArray and made == record == plain and bool((made.numpy() == values).all())
