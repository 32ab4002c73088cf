"""The Open Inference Protocol's ``binary_tensor_data`` extension: tensors as bytes behind the JSON, images without base64.

In: a body, or the values of a tensor. Out: the same, taken apart or put together. Knows no requests and no models.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

JSON_LENGTH = "inference-header-content-length"
"""Header: how many bytes of the body are JSON; tensors follow. 0: no JSON at all, the body is one element."""
EXTENSION = "binary_tensor_data"


def split_body(body: bytes, json_length: str | None) -> tuple[bytes, bytes]:
    """The JSON, and what follows it. ``json_length``: the header, None where there was none. Raises ValueError."""
    if json_length is None:
        return body, b""
    is_number = json_length.isascii() and json_length.isdigit() and len(json_length) < 20
    if not is_number or int(json_length) > len(body):
        raise ValueError(f"{JSON_LENGTH} must be a number of bytes, at most the body's {len(body)}, "
                         f"but is {json_length[:40]!r}")  # fmt: skip
    return body[: int(json_length)], body[int(json_length) :]


def unpack_bytes(packed: bytes, count: int) -> list[bytes]:
    """``count`` elements of a BYTES tensor: of each its length (4 bytes, little-endian), then so many bytes.

    Raises ValueError if there are more or fewer.
    """
    elements, at = list[bytes](), 0
    for index in range(count):
        start = at + 4
        at = start + int.from_bytes(packed[at:start], "little")
        if start > len(packed) or at > len(packed):
            raise ValueError(f"ends within element {index} of {count}")
        elements.append(packed[start:at])
    if at != len(packed):
        raise ValueError(f"holds {len(packed) - at} bytes more than its {count} elements")
    return elements


def pack_bytes(elements: Iterable[bytes]) -> bytes:
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def pack_floats(values: Sequence[float]) -> bytes:
    """FP32, little-endian."""
    return struct.pack(f"<{len(values)}f", *values)


def pack_outputs(outputs: Sequence[dict[str, Any]], are_binary: Sequence[bool]) -> tuple[list[dict[str, Any]], bytes]:
    """An answer's tensors as they stand in its JSON, and the bytes that follow it. ``are_binary``: of each tensor."""
    told, following = list[dict[str, Any]](), list[bytes]()
    for output, is_binary in zip(outputs, are_binary, strict=True):
        if is_binary:
            data = output["data"]
            packed = pack_floats(data) if output["datatype"] == "FP32" else pack_bytes(text.encode() for text in data)
            rest = {name: value for name, value in output.items() if name != "data"}
            output = rest | {"parameters": {"binary_data_size": len(packed)}}
            following.append(packed)
        told.append(output)
    return told, b"".join(following)
