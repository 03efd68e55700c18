"""Reading the arrays of numbers and text in a MATLAB file (version 5 to 7), as `scipy.io.savemat` and MATLAB write it.

SciPy's own reader, in C, trusts the lengths in a file: a single wrong byte can end the process. Here every length is
compared with what is there. The format: MathWorks, "MAT-File Format", level 5.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Types of data elements, and classes of arrays.
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXT = {1: "latin-1", 2: "latin-1", 4: "utf-16-{}", 16: "utf-8", 17: "utf-16-{}", 18: "utf-32-{}"}
_ARRAY, _COMPRESSED = 14, 15
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_CHARACTERS, _COMPLEX = 4, 0x800
_HEADER = 128


def read_mat(path: Path, *, growth: int) -> dict[str, np.ndarray]:
    """The arrays of a file by name; text is (rows,) strings. Complex, sparse, cell and struct arrays are one None each.

    growth  times its size that the file may unpack to

    Raises ValueError for what is damaged, no such file, or of version 7.3.
    """
    data = path.read_bytes()
    order = {b"IM": "<", b"MI": ">"}.get(data[126:_HEADER])
    if order is None or not data.startswith(b"MATLAB"):
        raise ValueError("no MATLAB file of version 5 to 7")
    if np.frombuffer(data, f"{order}u2", 1, 124)[0] != 0x100:
        raise ValueError("version 7.3, which is HDF5 and not read: save it as version 7")
    left = growth * len(data)
    found = {}
    for kind, content in _elements(memoryview(data)[_HEADER:], order):
        if kind == _COMPRESSED:
            stream = zlib.decompressobj()
            unpacked = stream.decompress(content, left)
            if not stream.eof:
                raise ValueError(f"cut short, or {len(data)} bytes that claim to hold more than {growth} times as many")
            left -= len(unpacked) - 1
            ((kind, content),) = _elements(memoryview(unpacked), order)
        if kind != _ARRAY:
            raise ValueError(f"an element of type {kind} where an array belongs")
        name, array = _array(content, order)
        found[name] = array
    return found


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and content of the elements that follow each other in `data`."""
    start = 0
    while start < len(data):
        if len(data) - start < 8:
            raise ValueError("cut short")
        kind, length = np.frombuffer(data, f"{order}u4", 2, start).tolist()
        begin = start + 8
        if kind >> 16:  # at most four bytes, which lie where else the length is
            kind, length, begin = kind & 0xFFFF, kind >> 16, start + 4
            end = start + 8
        else:
            end = begin + length + (-length % 8 if kind != _COMPRESSED else 0)
        content = data[begin : begin + length]
        if len(content) < length or begin + length > end:
            raise ValueError("cut short")
        yield kind, content
        start = end


def _array(data: memoryview, order: str) -> tuple[str, np.ndarray]:
    flags, sizes, name, *parts = _elements(data, order)
    flag = int(np.frombuffer(flags[1], f"{order}u4", 1)[0])
    shape = np.frombuffer(sizes[1], f"{order}i4").tolist()
    title = bytes(name[1]).decode("ascii")
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"{title} has an impossible shape")
    kind = flag & 0xFF
    if flag & _COMPLEX or kind not in (_CHARACTERS, *_CLASSES) or not parts:
        return title, np.array(None, dtype=object)
    stored, content = parts[0]
    if kind == _CHARACTERS:
        codec = _TEXT[stored].format("le" if order == "<" else "be")
        values = np.array(list(bytes(content).decode(codec)), dtype="U1")
    else:
        values = np.frombuffer(content, order + _NUMBERS[stored])
    if values.size != math.prod(shape):
        raise ValueError(f"{title} holds {values.size} values, not {' x '.join(map(str, shape))}")
    values = values.reshape(shape, order="F")
    if kind == _CHARACTERS:
        rows = np.ascontiguousarray(values).reshape(-1, shape[-1])
        return title, np.array(["".join(row) for row in rows.tolist()], dtype=str)
    return title, values.astype(_CLASSES[kind], order="C")
