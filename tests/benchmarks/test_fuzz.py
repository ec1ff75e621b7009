"""Damaged and hostile files: read where nothing was lost, refused by name, and nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.fuzz import MEMORY, fuzz, judge, limited_memory, main
from benchmarks.fuzz_inputs import TERABYTE, Bomb, damage, fresh_copy, npy_header, write_zip
from benchmarks.fuzz_readers import READERS
from jumprelu_plugin.saes.tensor_files import read_npz, read_safetensors, read_torch

INPUTS = 100
CHECKPOINTS = 50  # each builds a trainer


@pytest.mark.parametrize("name", READERS)
def test_a_reader_refuses_by_name_what_it_cannot_read(name: str, tmp_path: Path) -> None:
    inputs = CHECKPOINTS if "checkpoint" in name else INPUTS
    found = fuzz(name, range(inputs), tmp_path)
    assert found.faults == {}
    assert found.read + found.refused == inputs
    assert found.read and found.refused > inputs / 4


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("saelens", [2190]),  # weights that are a pipe
        ("dictionary-learning", [8654]),  # a file of an archive with two sizes
        ("checkpoint", [115, 309, 312, 534, 802, 1140, 4079]),  # fields of another type
        ("cross-layer-checkpoint", [185, 301, 628, 644, 1429]),  # scales and states of another form
        ("activation-cache", [7875]),  # more rows than a number holds
    ],
)
def test_inputs_that_were_faults_are_refused(name: str, inputs: list[int], tmp_path: Path) -> None:
    assert not fuzz(name, inputs, tmp_path).faults


def test_an_unknown_reader_is_refused_with_those_there_are(tmp_path: Path) -> None:
    app, output = typer.Typer(), tmp_path / "fuzz.jsonl"
    app.command()(main)
    given = ["--inputs", "1", "--output", str(output), "--reader", "saelens", "--reader", "nope"]
    done = CliRunner().invoke(app, given)
    said = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code == 2 and "there is no reader nope; known: " in said
    assert all(name in said for name in READERS) and not output.exists()


def test_the_same_number_is_the_same_input(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    READERS["cross-layer"].write(whole)
    contents = []
    for name in ("one", "other"):
        fresh_copy(whole, tmp_path / name)
        done = damage(tmp_path / name, random.Random("cross-layer 3"), tmp_path / "mark")
        files = sorted(path for path in (tmp_path / name).iterdir())
        contents.append((done, [path.read_bytes() for path in files if path.is_file()]))
    assert contents[0] == contents[1]


def test_faults_are_told_from_refusals(tmp_path: Path) -> None:
    """What the counts stand on: each kind of fault is seen."""
    assert judge(ValueError(f"{tmp_path}/x is cut off"), tmp_path) is None
    assert judge(FileNotFoundError(2, "gone", f"{tmp_path}/x"), tmp_path) is None
    assert "names no file" in str(judge(ValueError("cut off"), tmp_path))
    assert "KeyError" in str(judge(KeyError("W_enc"), tmp_path))
    assert "UnicodeDecodeError" in str(
        judge(UnicodeDecodeError("utf-8", b"\xff", 0, 1, str(tmp_path)), tmp_path)
    )
    wrapped = ValueError(f"{tmp_path}/x")
    wrapped.__cause__ = MemoryError()
    assert "more than" in str(judge(wrapped, tmp_path))
    with pytest.raises((MemoryError, RuntimeError)), limited_memory(MEMORY):
        torch.ones(64 * MEMORY // 4)  # more than a heap may have kept of what ran before


# ---------------------------------------------------------------- sizes that lie


def test_an_array_is_no_larger_than_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    write_zip(path, {"W_enc.npy": npy_header((TERABYTE,), "<f4") + b"\0" * 64}, 0)
    with pytest.raises(ValueError, match="promises 4,000,000,000,000 bytes and holds 192"):
        read_npz(path)
    write_zip(path, {"W_enc.npy": npy_header((9_000_000,), "<f4") + b"\0" * 36_000_000}, 8)
    with pytest.raises(ValueError, match="unpack to 36,000,128"):
        read_npz(path)


def test_a_tensor_is_no_larger_than_its_storage(tmp_path: Path) -> None:
    """PyTorch alone repeats one number a million times."""

    class Far:
        def __init__(self, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0):
            self.given = offset, size, stride

        def __reduce__(self):
            function, (storage, *_) = torch.zeros(7).__reduce_ex__(2)[:2]
            return (function, (storage, *self.given, False, {}))

    path = tmp_path / "ae.pt"
    torch.save({"W_enc": Far((1_000_003,), (0,))}, path)
    assert torch.load(path, weights_only=True)["W_enc"].shape == (1_000_003,)
    for far in (Far((1_000_003,), (1,)), Far((1_000_003,), (0,)), Far((2,), (1,), 6)):
        torch.save({"W_enc": far}, path)
        with pytest.raises(ValueError, match="larger than its storage of 7"):
            read_torch(path)


def test_a_file_of_an_archive_has_one_size(tmp_path: Path) -> None:
    """zipfile reads as many bytes as the packed size says, and allocates them first."""
    path = tmp_path / "ae.pt"
    torch.save({"W_enc": torch.zeros(7)}, path)
    raw = bytearray(path.read_bytes())
    entry = raw.index(b"PK\x01\x02")  # of data.pkl, the first in the archive's directory
    raw[entry + 20 : entry + 24] = (2**27).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="its files have two sizes"):
        read_torch(path)


def test_what_torch_saves_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    random = torch.Generator().manual_seed(1)
    matrix = torch.randn(5, 7, generator=random)
    optimizer = torch.optim.Adam([torch.nn.Parameter(matrix.clone())])
    given = {
        "transposed": matrix.T,
        "part": matrix[1:4, 2:],
        "half": matrix.to(torch.bfloat16),
        "flags": matrix > 0,
        "empty": matrix[:0],
        "parameter": torch.nn.Parameter(matrix),
        "optimizer": optimizer.state_dict(),
        "numbers": [1, 2**40, -0.5, None, True, ("text", {})],
    }
    torch.save(given, path)
    found = read_torch(path)
    assert found.keys() == given.keys()
    for name in ("transposed", "part", "half", "flags", "empty", "parameter"):
        assert torch.equal(found[name], given[name]), name
    assert found["numbers"] == given["numbers"] and found["optimizer"] == given["optimizer"]


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "ae.pt"
    for zipped in (True, False):
        torch.save({"W_enc": Bomb(mark)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"ae\.pt holds more than tensors"):
            read_torch(path)
    torch.load(path, weights_only=False)
    assert mark.exists()  # the bomb is one


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.symlink_to("/dev/zero")
    for read in (read_npz, read_safetensors, read_torch):
        with pytest.raises(ValueError, match="x is a device or pipe"):
            read(path)
