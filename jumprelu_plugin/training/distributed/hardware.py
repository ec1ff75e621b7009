"""Published figures of GPUs, from their makers' data sheets: peaks that no program quite reaches.

FLOP/s are dense, without sparsity. Bandwidths are in bytes a second, one way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU, and what connects them.

    Attributes:
        name: as people call it.
        memory: bytes of a GPU.
        bfloat16, float32: FLOP/s on tensor cores, and of plain float32.
        memory_bandwidth: of a GPU's own memory.
        link: between two GPUs of one machine.
        network: of a GPU to those of other machines.
        gpus: in a machine.
        source: where the figures are published.
    """

    name: str
    memory: float
    bfloat16: float
    float32: float
    memory_bandwidth: float
    link: float
    network: float
    gpus: int
    source: str


HARDWARE = {
    "a100": Hardware(
        name="A100 SXM 80 GB",
        memory=80e9,
        bfloat16=312e12,
        float32=19.5e12,
        memory_bandwidth=2.039e12,
        link=300e9,
        network=25e9,
        gpus=8,
        source="NVIDIA A100 and DGX A100 data sheets: NVLink 600 GB/s both ways, 200 Gb/s a GPU",
    ),
    "h100": Hardware(
        name="H100 SXM 80 GB",
        memory=80e9,
        bfloat16=989e12,
        float32=67e12,
        memory_bandwidth=3.35e12,
        link=450e9,
        network=50e9,
        gpus=8,
        source="NVIDIA H100 and DGX H100 data sheets: NVLink 900 GB/s both ways, 400 Gb/s a GPU",
    ),
    "h200": Hardware(
        name="H200 SXM 141 GB",
        memory=141e9,
        bfloat16=989e12,
        float32=67e12,
        memory_bandwidth=4.8e12,
        link=450e9,
        network=50e9,
        gpus=8,
        source="NVIDIA H200 and DGX H200 data sheets: NVLink 900 GB/s both ways, 400 Gb/s a GPU",
    ),
}


def hardware(name: str | None = None) -> Hardware:
    """The figures of one kind of GPU.

    Args:
        name: as in `HARDWARE`; None: this machine's GPU, or an H100 where there is none or its
            figures are not recorded.

    Raises:
        ValueError: none are recorded.
    """
    if name is None:
        own = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        known = (HARDWARE[kind] for kind in HARDWARE if kind.upper() in own.upper())
        return next(known, HARDWARE["h100"])
    found = HARDWARE.get(name.lower())
    if found is None:
        raise ValueError(
            f"hardware is {name!r}; published figures are recorded for {', '.join(HARDWARE)}"
        )
    return found
