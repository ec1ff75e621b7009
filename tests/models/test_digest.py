"""A digest is SHA-256, and tells apart what differs."""

from __future__ import annotations

import hashlib

import pytest
import torch

from jumprelu_plugin.models.digest import digest


def test_digest_is_sha256_and_tells_apart_what_differs():
    assert digest(b"abc") == hashlib.sha256(b"bytes 3:abc").hexdigest()[:16]
    tensor = torch.arange(6, dtype=torch.float32)
    same = [tensor, tensor.clone(), torch.arange(12.0)[::2] / 2]  # the last is not contiguous
    assert len({digest(t) for t in same}) == 1
    different = [
        tensor,
        tensor.reshape(2, 3),
        tensor.reshape(3, 2),
        tensor.double(),
        tensor.bfloat16(),
        -tensor,
        b"abc",
        "abc",
        ["ab", "c"],
        {"a": tensor},
        {"b": tensor},
        torch.tensor(0.0),
        torch.zeros(0),
    ]
    assert len({digest(item) for item in different}) == len(different)
    assert digest({"a": tensor, "b": -tensor}) == digest({"b": -tensor, "a": tensor})
    assert digest(tensor, b"x") != digest(b"x", tensor)
    with pytest.raises(TypeError, match="got int"):
        digest(3)  # pyright: ignore[reportArgumentType]
