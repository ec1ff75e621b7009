"""Looks at what a file of `torch.save` would build, before PyTorch builds it.

`torch.load(..., weights_only=True)` runs no code of a file, and believes its sizes: a tensor may
repeat one number a trillion times (stride 0), so that its first copy takes terabytes, and a packed
or an old-style archive allocates whatever it names. Here the file's pickle is first read with
stand-ins for tensors and storages: names outside a short list are refused, nothing is allocated,
and each tensor's extent is compared with the bytes that the archive holds for it.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jumprelu_plugin.records import require_file

_ITEM_SIZES = {
    "torch DoubleStorage": 8,
    "torch FloatStorage": 4,
    "torch HalfStorage": 2,
    "torch BFloat16Storage": 2,
    "torch LongStorage": 8,
    "torch IntStorage": 4,
    "torch ShortStorage": 2,
    "torch CharStorage": 1,
    "torch ByteStorage": 1,
    "torch BoolStorage": 1,
}
# What `torch.save` writes for tensors, numbers, text, lists, tuples and dicts. Without those for
# objects, and those that allocate as much as they name.
_OPCODES = frozenset(
    """PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID NONE NEWTRUE NEWFALSE BININT BININT1 BININT2
    LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST
    APPEND APPENDS EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET""".split()  # noqa: SIM905
)


class _Storage(NamedTuple):
    key: str
    item_size: int
    numel: int


def require_plain_tensors(path: Path) -> None:
    """Refuse a file of `torch.save` that holds more than tensors, or tensors larger than itself.

    Raises:
        ValueError: saying what it holds.
        OSError: it cannot be opened.
    """
    require_file(path)
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                _require_plain(archive, path.stat().st_size)
        except Exception as error:  # what a damaged archive or pickle raises has many types
            reason = str(error) or type(error).__name__
            raise ValueError(f"{path}: {reason}") from error


def _require_plain(archive: zipfile.ZipFile, size: int) -> None:
    members = archive.infolist()
    names = [member.filename.partition("/")[2] for member in members]
    folders = {member.filename.partition("/")[0] for member in members}
    # PyTorch's own reader must find the same files in it.
    if len(folders) != 1 or len(set(names)) != len(names):
        raise ValueError("its files are not in one folder, each once")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its files are compressed, as torch.save does not do")
    if any(member.compress_size != member.file_size for member in members):
        raise ValueError("its files have two sizes")  # the larger would be allocated
    if sum(member.file_size for member in members) > size:
        raise ValueError("its files are larger than itself")
    if "data.pkl" not in names:
        raise ValueError("there is no data.pkl in it, which torch.save writes since 1.6")
    held = {name: member.file_size for name, member in zip(names, members, strict=True)}
    raw = archive.read(members[names.index("data.pkl")])
    for opcode, value, _ in pickletools.genops(raw):
        if opcode.name not in _OPCODES:
            raise ValueError(f"its pickle has the operation {opcode.name}")
        if opcode.name == "LONG_BINPUT" and (value or 0) > len(raw):
            raise ValueError(f"its pickle counts to {value}")
    try:
        _Description(raw, held).load()
    except (TypeError, AttributeError, IndexError, KeyError) as error:
        raise pickle.UnpicklingError(f"its pickle is damaged: {error}") from None


class _Description(pickle.Unpickler):
    """Builds stand-ins, and nothing that the pickle names; `load` raises for what is not plain."""

    def __init__(self, raw: bytes, held: Mapping[str, int]):
        super().__init__(io.BytesIO(raw))
        self._held = held

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module} {name}"
        plain = {
            "collections OrderedDict": OrderedDict,
            "collections Counter": Counter,
            "torch._utils _rebuild_tensor_v2": _require_extent,
            "torch._utils _rebuild_parameter": _same,
            "torch Size": tuple,
        }
        if full in plain:
            return plain[full]
        if full in _ITEM_SIZES:
            return full
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or dtype not in _ITEM_SIZES or not isinstance(numel, int):
            raise ValueError(f"it names a storage {pid}")
        storage = _Storage(str(key), _ITEM_SIZES[dtype], numel)
        held = self._held.get(f"data/{key}", 0)
        if numel < 0 or numel * storage.item_size != held:
            raise ValueError(
                f"storage {key} is to have {numel * storage.item_size:,} bytes and has {held:,}"
            )
        return storage


def _require_extent(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> str:
    """A stand-in for the tensor, if it lies within its storage and repeats no element."""
    if not isinstance(storage, _Storage) or len(size) != len(stride):
        raise ValueError("a tensor has no storage, or more sizes than strides")
    if any(not isinstance(number, int) or number < 0 for number in (offset, *size, *stride)):
        raise ValueError(f"a tensor has shape {size}, strides {stride} and offset {offset}")
    numel, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        numel *= length
        last += max(length - 1, 0) * step
    if numel > storage.numel or (numel and last >= storage.numel):
        raise ValueError(f"a tensor of shape {size} is larger than its storage of {storage.numel}")
    return "tensor"


def _same(tensor: Any, *_: Any) -> Any:
    return tensor
