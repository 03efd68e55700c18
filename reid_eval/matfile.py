"""A reader of the arrays of numbers and text in MATLAB files (version 5 to 7), as `scipy.io.savemat` writes them.

`scipy.io.loadmat` is C code that trusts the file: one wrong byte in the type of an element ends the process with a
segmentation fault, and a compressed element may unpack to any size. Feature files come from anywhere, so this reader
checks every type and length. The format is described in MathWorks' "MAT-File Format", level 5.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Types of data elements, and classes of arrays.
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXT = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}
_ARRAY, _COMPRESSED = 14, 15
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_CHARACTERS, _COMPLEX = 4, 0x800
_HEADER = 128


def read_mat(path: Path, *, growth: int) -> dict[str, np.ndarray]:
    """The arrays of a file by name; text becomes strings (rows,). Arrays that are neither text nor real
    numbers are left out.

    growth  how many times its size the file may unpack to

    Raises ValueError, KeyError, UnicodeError or zlib.error for a file that is damaged or of another format.
    """
    data = memoryview(path.read_bytes())
    if data[:6] != b"MATLAB" or data[124:_HEADER] != b"\x00\x01IM":
        raise ValueError("not a little-endian MATLAB file of version 5 to 7")
    left = growth * len(data)
    arrays = {}
    for kind, content in _elements(data[_HEADER:]):
        if kind == _COMPRESSED:
            stream = zlib.decompressobj()
            unpacked = stream.decompress(content, left)
            if not stream.eof:
                raise ValueError(f"cut short, or {len(data)} bytes that claim to hold more than {growth} times as many")
            left -= len(unpacked) - 1  # at least 1, since a limit of 0 is none
            ((kind, content),) = _elements(memoryview(unpacked))
        if kind != _ARRAY:
            raise ValueError(f"an element of type {kind} instead of an array")
        name, array = _array(content)
        if array is not None:
            arrays[name] = array
    return arrays


def _elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and content of the elements that follow each other in `data`."""
    start = 0
    while start < len(data):
        if len(data) - start < 8:
            raise ValueError("cut short")
        kind, length = np.frombuffer(data, "<u4", 2, start).tolist()
        begin, room = start + 8, len(data)
        if kind >> 16:  # a small element: at most four bytes, which lie where the length usually is
            kind, length, begin, room = kind & 0xFFFF, kind >> 16, start + 4, 4
        content = data[begin : begin + length]
        if len(content) < length or length > room:
            raise ValueError("cut short")
        yield kind, content
        padding = -length % 8 if kind != _COMPRESSED else 0
        start = start + 8 if room == 4 else begin + length + padding


def _array(data: memoryview) -> tuple[str, np.ndarray | None]:
    flags, sizes, name, *parts = _elements(data)
    flag = int(np.frombuffer(flags[1], "<u4", 1)[0])
    shape = np.frombuffer(sizes[1], "<i4").tolist()
    title = bytes(name[1]).decode("ascii")
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"{title} has an impossible shape")
    kind = flag & 0xFF
    if flag & _COMPLEX or kind not in (_CHARACTERS, *_CLASSES) or not parts:
        return title, None
    stored, content = parts[0]
    if kind == _CHARACTERS:
        values = np.array(list(bytes(content).decode(_TEXT[stored])), dtype="U1")
    else:
        values = np.frombuffer(content, "<" + _NUMBERS[stored])
    if values.size != math.prod(shape):
        raise ValueError(f"{title} holds {values.size} values, not {' x '.join(map(str, shape))}")
    values = values.reshape(shape, order="F")
    if kind == _CHARACTERS:
        rows = np.ascontiguousarray(values).reshape(-1, shape[-1])
        return title, np.array(["".join(row) for row in rows.tolist()], dtype=str)
    return title, values.astype(_CLASSES[kind], order="C")
