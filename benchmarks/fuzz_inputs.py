"""Damaged and hostile files, made from whole ones: broken bytes, sizes that lie, code to run."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

Change = Callable[[Path, random.Random, Path], None]

TERABYTE = 10**12
HOSTILE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    7,
    10**9,
    10**30,
    1e300,
    0.5,
    "",
    "nan",
    "../../../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    "jumprelu; touch /tmp/x",
    [],
    {},
    [1, 2],
    ["../x"],
    {"a": {"b": [None]}},
    [[1.0]],
    "x" * 5000,
)


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


# ---------------------------------------------------------------- any file


def truncate(path: Path, rng: random.Random, mark: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: rng.randrange(len(raw) + 1)])


def flip_bits(path: Path, rng: random.Random, mark: Path) -> None:
    raw = bytearray(path.read_bytes())
    # Headers are where a flipped bit means the most.
    reach = len(raw) if rng.random() < 0.5 else min(len(raw), 512)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        raw[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def flip_bits_at_end(path: Path, rng: random.Random, mark: Path) -> None:
    """Of an archive, that is its table of contents."""
    raw = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 2, 8))):
        raw[-1 - rng.randrange(min(len(raw), 512))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def cut_piece(path: Path, rng: random.Random, mark: Path) -> None:
    raw = path.read_bytes()
    start, stop = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    path.write_bytes(raw[:start] + raw[stop:])


def insert_piece(path: Path, rng: random.Random, mark: Path) -> None:
    raw = path.read_bytes()
    place, piece = rng.randrange(len(raw) + 1), rng.randbytes(rng.choice((1, 4, 64, 1000)))
    path.write_bytes(raw[:place] + piece + raw[place:])


def overwrite_piece(path: Path, rng: random.Random, mark: Path) -> None:
    raw = bytearray(path.read_bytes())
    place = rng.randrange(len(raw))
    length = min(rng.choice((1, 4, 8, 100)), len(raw) - place)
    filler = rng.choice((b"\0", b"\xff", b"\x7f", rng.randbytes(1)))
    raw[place : place + length] = filler * length
    path.write_bytes(raw)


def replace_by_noise(path: Path, rng: random.Random, mark: Path) -> None:
    path.write_bytes(rng.randbytes(rng.choice((0, 1, 8, 300, 20_000))))


def replace_by_other(path: Path, rng: random.Random, mark: Path) -> None:
    """Another file of the folder, a link to nothing or to itself, a folder, a device, nothing."""
    others = [other for other in path.parent.iterdir() if other != path and other.is_file()]
    how = rng.randrange(7)
    raw = rng.choice(others).read_bytes() if others else b""
    path.unlink()
    if how == 0:
        path.write_bytes(raw)
    elif how == 1:
        path.symlink_to(path)
    elif how == 2:
        path.symlink_to("/nowhere/at/all")
    elif how == 3:
        path.mkdir()
    elif how == 4:
        os.mkfifo(path)
    elif how == 5:
        path.symlink_to("/dev/zero")


def replace_by_pickle(path: Path, rng: random.Random, mark: Path) -> None:
    bomb = Bomb(mark)
    if rng.random() < 0.5:
        path.write_bytes(pickle.dumps(bomb, protocol=rng.randrange(6)))
    else:
        torch.save({"W_enc": bomb}, path, _use_new_zipfile_serialization=rng.random() < 0.7)


ANY: tuple[Change, ...] = (
    truncate,
    truncate,
    flip_bits,
    flip_bits,
    flip_bits_at_end,
    cut_piece,
    insert_piece,
    overwrite_piece,
    replace_by_noise,
    replace_by_other,
    replace_by_pickle,
)

# ---------------------------------------------------------------- JSON and YAML


def change_value(value: Any, rng: random.Random) -> Any:
    """The value with one of the values in it replaced, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {name: part for name, part in value.items() if name != key}
        if rng.random() < 0.1:
            return {**value, rng.choice(("__class__", "architecture", "x")): rng.choice(HOSTILE)}
        return {**value, key: change_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        index = rng.randrange(len(value))
        changed = change_value(value[index], rng)
        return [*value[:index], changed, *value[index + 1 :]]
    return rng.choice(HOSTILE)


def change_json(path: Path, rng: random.Random, mark: Path) -> None:
    if rng.random() < 0.05:
        path.write_text("[" * 200_000)
    elif rng.random() < 0.05:
        path.write_text('{"a": ' * 50_000 + "1" + "}" * 50_000)
    else:
        value = change_value(json.loads(path.read_text()), rng)
        text = json.dumps(value)
        path.write_text(text.replace("0.5", rng.choice(("0.5", "NaN", "Infinity", "1e999"))))


def change_jsonl(path: Path, rng: random.Random, mark: Path) -> None:
    lines = path.read_text().splitlines()
    place = rng.randrange(len(lines))
    lines[place] = json.dumps(change_value(json.loads(lines[place]), rng))
    if rng.random() < 0.3:
        lines[place] = lines[place][: rng.randrange(len(lines[place]) + 1)]
    path.write_text("\n".join(lines) + rng.choice(("\n", "")))


def change_yaml(path: Path, rng: random.Random, mark: Path) -> None:
    how = rng.random()
    if how < 0.1:
        path.write_text(f"model_kind: !!python/object/apply:os.system ['touch {mark}']\n")
    elif how < 0.2:
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
        path.write_text("\n".join(lines))
    elif how < 0.25:
        path.write_text("[" * 5000)
    else:
        path.write_text(yaml.safe_dump(change_value(yaml.safe_load(path.read_text()), rng)))


# ---------------------------------------------------------------- tensors


def change_safetensors(path: Path, rng: random.Random, mark: Path) -> None:
    """Another header before the same bytes: other shapes, types, places and lengths."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    how = rng.random()
    if how < 0.15:
        length_said = rng.choice((0, 1, len(raw), 2**31, 2**62, 2**64 - 1))
        path.write_bytes(length_said.to_bytes(8, "little") + raw[8:])
        return
    if how < 0.5:
        name = rng.choice([key for key in sorted(header) if key != "__metadata__"])
        sizes = header[name]["shape"]
        if rng.random() < 0.5 and sizes:
            sizes[rng.randrange(len(sizes))] = rng.choice((0, 1, TERABYTE, 2**62, -1))
        elif rng.random() < 0.5:
            header[name]["shape"] = [*sizes[::-1], 1][: rng.randrange(4)]
        else:
            kinds = ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "U16", "X")
            header[name]["dtype"] = rng.choice(kinds)
    elif how < 0.65:
        names = [key for key in sorted(header) if key != "__metadata__"]
        old, new = rng.choice(names), rng.choice(("../../x", "", "W_enc", "extra", "a\0"))
        header[new] = header.pop(old)
    else:
        header = change_value(header, rng)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_npz(path: Path, rng: random.Random, mark: Path) -> None:
    """An array replaced: by one whose header lies, by objects, by gigabytes of zeros packed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    how = rng.randrange(7)
    packing = zipfile.ZIP_STORED
    if how == 0:
        members[name] = npy_header((TERABYTE,), "<f4") + b"\0" * 64
    elif how == 1:
        members[name] = npy_header((rng.choice((-1, 0, 2**40)), 3), rng.choice(("<f8", "<U999999")))
    elif how == 2:
        buffer = io.BytesIO()
        np.save(buffer, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
        members[name] = buffer.getvalue()
    elif how == 3:
        zeros = 200_000_000 if rng.random() < 0.02 else 5_000_000
        members[name] = npy_header((zeros // 4,), "<f4") + b"\0" * zeros
        packing = zipfile.ZIP_DEFLATED
    elif how == 4:
        members["../../" + name] = members.pop(name)
    elif how == 5:
        raw = bytearray(members[name])
        raw[rng.randrange(min(len(raw), 128))] ^= 1 << rng.randrange(8)
        members[name] = bytes(raw)
    else:
        values = np.load(io.BytesIO(members[name]))
        kinds = ("float16", "float64", "int8", "complex64", "bool", "<M8[s]", "S3")
        buffer = io.BytesIO()
        np.save(buffer, values.astype(rng.choice(kinds)))
        members[name] = buffer.getvalue()
    write_zip(path, members, packing)


def npy_header(shape: tuple[int, ...], descr: str) -> bytes:
    """The header of an npy file, of whatever shape."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def write_zip(path: Path, members: dict[str, bytes], packing: int) -> None:
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)


class Far:
    """Pickled as a tensor of a terabyte over a storage of a few bytes."""

    def __init__(self, tensor: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...]):
        self.tensor, self.size, self.stride = tensor, size, stride

    def __reduce__(self) -> Any:
        function, (storage, *_) = self.tensor.__reduce_ex__(2)[:2]
        return (function, (storage, 0, self.size, self.stride, False, {}))


class Huge:
    """Pickled as a call that PyTorch's safe unpickler allows, and that allocates what it names."""

    def __reduce__(self) -> Any:
        return (bytearray, (TERABYTE,))


def change_torch(path: Path, rng: random.Random, mark: Path) -> None:
    """Code to run, tensors larger than the file, packed archives, flips in the pickle."""
    how = rng.randrange(6)
    if how == 0:
        torch.save({"W_enc": Bomb(mark)}, path)
    elif how == 1:
        strides = ((1,), (0,))
        far = Far(torch.zeros(4), (TERABYTE // 4,), rng.choice(strides))
        torch.save({name: far for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}, path)
    elif how == 2:
        torch.save({"W_enc": Huge()}, path)
    else:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        (data,) = (name for name in members if name.endswith("/data.pkl"))
        raw = bytearray(members[data])
        for _ in range(rng.choice((1, 1, 3, 20))):
            raw[rng.randrange(len(raw))] = rng.choice((rng.randrange(256), 0xFF, 0, ord("R")))
        members[data] = bytes(raw)
        if how == 5:
            other = rng.choice(sorted(members))
            members[other] = members[other][: rng.randrange(len(members[other]) + 1)]
        write_zip(path, members, zipfile.ZIP_DEFLATED if how == 4 else zipfile.ZIP_STORED)


BY_SUFFIX: dict[str, Change] = {
    ".json": change_json,
    ".jsonl": change_jsonl,
    ".yaml": change_yaml,
    ".safetensors": change_safetensors,
    ".npz": change_npz,
    ".pt": change_torch,
}


def damage(folder: Path, rng: random.Random, mark: Path) -> str:
    """Damage one file in a folder, and sometimes a second; returns what was done to which."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        files = [path for path in files if path.stat().st_size]
        if not files:
            break
        path = rng.choice(files)
        own = BY_SUFFIX.get(path.suffix)
        change = own if own is not None and rng.random() < 0.6 else rng.choice(ANY)
        try:
            change(path, rng, mark)
        except Exception:  # it was damaged before, and no change of its kind fits
            if path.is_file():
                truncate(path, rng, mark)
        done.append(f"{change.__name__} {path.relative_to(folder)}")
    return ", ".join(done)


def fresh_copy(whole: Path, folder: Path) -> None:
    """The folder as it was before anything was damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
