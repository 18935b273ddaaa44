"""Tensors in one file of the safetensors format, which needs no package: https://github.com/huggingface/safetensors#format.

The length of a header in eight bytes (little-endian), the header in JSON (name → dtype, shape, place of the bytes), then the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
SETTINGS = "settings"
"""The name of the text about the tensors that holds the settings of their model, as JSON."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors (any shape, on any device) and texts about them. OSError if the file cannot be written."""
    header: dict[str, Any] = {_METADATA: {"format": "pt", **(metadata or {})}}
    place = 0
    for name, t in tensors.items():
        stop = place + t.numel() * t.element_size()
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [place, stop]}
        place = stop
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that the tensors begin at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():
            flat = t.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def is_tensor_file(path: Path) -> bool:
    """Whether a file begins as one of this format does; False if it cannot be read. Its name does not matter."""
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and the texts about them.

    Raises:
        ValueError: it is not of this format, or incomplete. OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        whole = path.stat().st_size
        if not 2 <= size <= whole - 8:
            raise ValueError(f"{path} is not a safetensors file, or it is incomplete; copy it again")
        try:
            header = json.loads(file.read(size))
            metadata = header.pop(_METADATA, {})
            tensors = {}
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                file.seek(8 + size + start)
                raw = bytearray(file.read(stop - start))
                dtype = _DTYPES[entry["dtype"]]
                t = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
                tensors[name] = t.reshape(entry["shape"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a sound safetensors file ({type(error).__name__}: {error}); copy it again"
            ) from error
    return tensors, metadata
