"""Reads files of tensors that may come from anyone.

Nothing in them is run, and no size that they name is believed before the file is seen to hold as
many bytes: what is read takes no more memory than the file explains. What the libraries raise
becomes a ValueError that names the file.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from jumprelu_plugin.records import require_file
from jumprelu_plugin.saes.pickled_tensors import require_plain_tensors

# Unpacked over packed. Weights hardly shrink; what is packed a thousandfold is all the same number.
_MOST_PACKED = 32
_MOST_HEADER = 10_000


@contextmanager
def explained(source: Path, advice: str = "copy or download it again") -> Iterator[None]:
    """Within the block, a library's error about a file becomes a ValueError that names `source`.

    An OSError that names its file stays, and so does a ValueError that names `source`.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # each library has its own
        names_file = isinstance(error, OSError) and error.filename is not None
        if names_file or (type(error) is ValueError and str(source) in str(error)):
            raise
        reason = str(error) or type(error).__name__
        missing = f"there is no {reason} in it" if isinstance(error, KeyError) else reason
        raise ValueError(
            f"{source} cannot be read: {missing}. If it is damaged, {advice}"
        ) from error


def read_safetensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors in a safetensors file, whose format holds nothing else.

    Raises:
        ValueError: the file is damaged, or another kind of file.
        OSError: it cannot be opened.
    """
    with _named_safetensors(path):
        return load_file(path, device=device)


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, from its header.

    Raises as `read_safetensors` does.
    """
    with _named_safetensors(path), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _named_safetensors(path: Path) -> Iterator[None]:
    require_file(path)
    try:
        with explained(path):
            yield
    except ValueError as error:
        raise ValueError(f"{path} is not a safetensors file: {error.__cause__ or error}") from error


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of numbers in an npz file, without unpickling.

    Raises:
        ValueError: the file is damaged, holds something else than arrays of numbers, or promises
            more than it holds.
        OSError: it cannot be opened.
    """
    require_file(path)
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _arrays(archive, path.stat().st_size)
        except MemoryError:
            raise
        except Exception as error:  # of zipfile, zlib, struct and NumPy's header, of many types
            raise ValueError(
                f"{path} is not an archive of plain arrays ({error}). Pickled objects are not "
                "loaded, because unpickling runs code; download the file again"
            ) from error


def _arrays(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    members = archive.infolist()
    unpacked = sum(member.file_size for member in members)
    if unpacked > _MOST_PACKED * size:
        raise ValueError(f"its {size:,} bytes unpack to {unpacked:,}")
    arrays = {}
    for member in members:
        with archive.open(member) as file:
            arrays[member.filename.removesuffix(".npy")] = _array(file, member)
    return arrays


def _array(file: IO[bytes], member: zipfile.ZipInfo) -> np.ndarray:
    """One array, whose header is compared with the bytes that follow before they are read."""
    readers: dict[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"{member.filename} has version {version} of the npy format")
    shape, by_column, dtype = readers[version](file, max_header_size=_MOST_HEADER)
    if dtype.kind not in "fiu":
        raise ValueError(f"{member.filename} holds {dtype}, not numbers")
    if any(length < 0 for length in shape):
        raise ValueError(f"{member.filename} has shape {shape}")
    expected = math.prod(shape) * dtype.itemsize
    if expected > member.file_size:
        raise ValueError(
            f"{member.filename} promises {expected:,} bytes and holds {member.file_size:,}"
        )
    raw = file.read(expected)
    if len(raw) != expected:
        raise ValueError(f"{member.filename} is cut off: {len(raw):,} bytes of {expected:,}")
    order = "F" if by_column else "C"
    return np.frombuffer(bytearray(raw), dtype).reshape(shape, order=order)


def read_torch(path: Path, device: str | torch.device = "cpu") -> Any:
    """Tensors, numbers and text that `torch.save` wrote, in lists and mappings.

    Raises:
        ValueError: the file is damaged, holds anything else, or a tensor in it is larger than its
            bytes.
        OSError: it cannot be opened.
    """
    try:
        require_plain_tensors(path)
        with explained(path):
            return torch.load(path, map_location=device, weights_only=True)
    except ValueError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged ({error.__cause__ or error}). Other "
            "pickled objects are not loaded, because unpickling runs code"
        ) from error
