"""The most memory a training will take, from its sizes: SAEs, sets of transcoders, CLTs.

A run has four moments that could be its peak: when it calibrates on its first batch, in a step,
while it draws activations, and while it writes a checkpoint. Between them weights, Adam's moments
and the buffer of activations stay.

The counts reproduce the peak resident memory of real runs within a factor of 1.3, on a CPU with
one thread (test_memory.py of tests/training/health and of tests/transcoders). They are what a run
needs. glibc keeps freed blocks of up to 32 MB, which can double what a run of a few hundred
megabytes holds; with MALLOC_MMAP_THRESHOLD_=1000000 in the environment it gives them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from jumprelu_plugin.models.devices import same_device
from jumprelu_plugin.training.activations.read_ahead import passes_ahead
from jumprelu_plugin.training.distributed.division import ALONE, Division
from jumprelu_plugin.training.health.machine import available, taken

FLOAT32 = 4
# Arrays [batch, d_sae] that exist together at the widest point of one dictionary's dense step: z,
# activations, gates, windows and their gradients. Measured at d_in 33, d_sae 32,749 and 601 tokens:
# 9.0 for an SAE, 9.1 for a transcoder; 7.1 for a layer of a cross-layer transcoder, whose loss has
# no prefixes.
STEP_ARRAYS = 9.0
STEP_ARRAYS_CLT = 7.1
# Of these, z and the activations stay for the log: an SAE's into its next step, a transcoder's
# while the others of its set take their steps (2.05 measured). A layer of a cross-layer transcoder
# keeps 2.9 for the backward pass.
KEPT_FOR_LOG = 2.0
KEPT_FOR_BACKWARD = 2.9
# The same while z is calibrated before the first step, when there are no gradients yet: z, the
# quantile's copy and what it is compared with (2.75 measured). A transcoder's decoder rows start
# from the activations: two copies beside z and its mask (3.25).
CALIBRATION_ARRAYS = 2.75
CALIBRATION_ARRAYS_TRANSCODER = 3.25
# Bytes of a kept pair in the sparse step: place, row and column, several times (8 bytes each), z,
# activation, gate and their gradients (4 each).
BYTES_PER_ENTRY = 145
# What the sparse step takes at one time beside its entries (`step.select`).
TILE_BYTES = {"cpu": 2**25}
TILE_BYTES_ELSEWHERE = 2**29
# Rows of a batch: as drawn, joined, scaled, and the output.
ROW_COPIES = 4
# Copies of the mixing buffer while it is filled: what waited, the new rows, joined, shuffled.
BUFFER_COPIES = 3.5


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes on one device at the peak of a run.

    Attributes:
        device: its name.
        there: taken before the training starts: the process, the model, the SAE's weights.
        optimizer: gradients and Adam's two moments.
        buffer: the mixing buffer, once.
        moment: which moment is the peak: "step", "calibration", "drawing" or "saving"; "joining"
            where the first of several processes saves for all (`health.saving`).
        working: what that moment takes beside the parts above, less gradients where there are none.
        available: what the machine has left for it now, `there` included; None if it is not known.
    """

    device: str
    there: int
    optimizer: int
    buffer: int
    moment: str
    working: int
    available: int | None

    @property
    def peak(self) -> int:
        return self.there + self.optimizer + self.buffer + self.working

    def largest(self) -> str:
        """The part that is largest, by name."""
        parts = {"optimizer": self.optimizer, "buffer": self.buffer, self.moment: self.working}
        return max(parts, key=lambda part: parts[part])


def forecast(
    cfg: Any,
    sae: Any,
    model: Any,
    entries: float,
    *,
    calibrates: bool,
    width: int,
    division: Division = ALONE,
    saves_buffer: bool = False,
) -> MemoryForecast:
    """Memory of a training on the device of its SAE.

    Args:
        cfg: SAELens' runner config.
        entries: pairs a token that the sparse step keeps; d_sae if not known.
        calibrates: whether the first step measures z first.
        width: of the rows in the mixing buffer.
        division: over processes, of which this is one; the first batch is calibrated on whole.
        saves_buffer: whether checkpoints hold the mixing buffer.
    """
    device = torch.device(cfg.device)
    parameters = parameter_bytes(sae)
    buffer, forward, one_pass = harvest_bytes(cfg, model, width, division)
    moments = sae_moments(
        batch=cfg.train_batch_size_tokens,
        replicas=division.replicas,
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        width=width,
        entries=entries,
        step_kernel=getattr(sae.cfg, "step_kernel", "dense"),
        device_type=device.type,
        weights=parameters,
        buffer=buffer,
        drawing=forward,
        one_pass=one_pass,
        calibrates=calibrates,
        # Each run that can saves every few minutes, and when it is stopped.
        saves=saves_buffer and cfg.checkpoint_path is not None,
    )
    return at_its_peak(device, parameters, buffer, moments)


def parameter_bytes(module: Any) -> int:
    """Of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def harvest_bytes(
    cfg: Any,
    model: Any,
    width: int,
    division: Division = ALONE,
    device: torch.device | None = None,
) -> tuple[int, int, int]:
    """On one device: the mixing buffer with what is read ahead for it, a forward pass of the model,
    and what one pass gives; 0 where another device holds it.

    Args:
        cfg: SAELens' runner config.
        width: of the rows in the buffer.
        division: over processes, of which this is one.
        device: by default that of what is trained.
    """
    trained_on = torch.device(cfg.device)
    device, prompts = device or trained_on, cfg.store_batch_size_prompts
    buffered_here = same_device(cfg.act_store_device or trained_on, device)
    row = FLOAT32 * cfg.context_size * width if buffered_here else 0
    forward = 0
    if same_device(cfg.llm_device or trained_on, device):
        sequences = division.sequences(prompts, alone=bool(cfg.prefetch_llm_batches))
        forward = forward_bytes(model, width, cfg.context_size, sequences)
    buffer = cfg.n_batches_in_buffer * row
    # Processes that share a pass read ahead only where they are asked to.
    ahead = passes_ahead(cfg) if division.processes == 1 or cfg.prefetch_llm_batches else 0
    if ahead:  # these wait, one more is made, and the model runs beside a step
        buffer += (ahead + 1) * prompts * row + forward
    return buffer, forward, prompts * row


def at_its_peak(
    device: torch.device, weights: int, buffer: int, moments: Mapping[str, int]
) -> MemoryForecast:
    """The forecast from what each moment takes beside weights, optimizer and buffer, in bytes."""
    moment = max(moments, key=lambda name: moments[name])
    return MemoryForecast(
        device=str(device),
        there=taken(device),
        optimizer=3 * weights,
        buffer=buffer,
        moment=moment,
        working=moments[moment],
        available=available(device),
    )


def sae_moments(
    *,
    batch: int,
    replicas: int,
    d_in: int,
    d_sae: int,
    width: int,
    entries: float,
    step_kernel: str,
    device_type: str,
    weights: int,
    buffer: int,
    drawing: int,
    one_pass: int,
    calibrates: bool,
    saves: bool,
) -> dict[str, int]:
    """What each moment of an SAE's run takes beside weights, gradients, Adam's moments and buffer.

    Args:
        batch: tokens in a step of all replicas.
        d_sae: latents in this process.
        weights, buffer: their bytes.
        drawing, one_pass: bytes of a forward pass of the model, and of what it gives.
        calibrates, saves: whether the run has these moments.
    """
    tokens = batch // replicas
    step = step_bytes(
        tokens, d_in, d_sae, entries, step_kernel, device_type, others=1, kept=KEPT_FOR_LOG
    )
    return {
        # The SAE's tangential gradients and the like take one more copy of a matrix or two.
        "step": step + weights + rows_bytes(tokens, width),
        "calibration": calibration_bytes(batch, d_sae) * calibrates - 3 * weights,
        # No gradients exist while activations are drawn, or while a checkpoint is written.
        "drawing": max(int((BUFFER_COPIES - 1) * buffer), drawing) + one_pass - weights,
        "saving": buffer if saves else 0,
    }


# ---------------------------------------------------------------- the parts


def usual_entries(batch: int, d_sae: int, target_l0: float | None) -> float:
    """Pairs a token that a step keeps, where no batch was looked at.

    The default window's at a target, which holds about twice the active ones beside them; a tenth
    of the latents without one. At the start each latent fires on one token of a batch or more.
    """
    if target_l0 is None:
        return 0.1 * d_sae
    return min(3.0 * max(target_l0, d_sae / batch), d_sae)


def step_bytes(
    batch: int,
    d_in: int,
    d_sae: int,
    entries: float,
    step_kernel: str,
    device_type: str,
    *,
    others: int,
    kept: float,
    arrays: float = STEP_ARRAYS,
) -> int:
    """Temporaries of a step that are as many as pairs of a token and a latent.

    Args:
        entries: pairs a token that the sparse step keeps.
        step_kernel: as in the config; `auto` may take any path.
        others: steps, of this dictionary or others, whose arrays exist meanwhile.
        kept: how many arrays each of them keeps (`KEPT_FOR_LOG`, `KEPT_FOR_BACKWARD`).
        arrays: at the widest point of the step.
    """
    array = FLOAT32 * batch * d_sae
    steps = 1 + others * kept / arrays
    dense = int(arrays * array * steps)
    tile = min(array, TILE_BYTES.get(device_type, TILE_BYTES_ELSEWHERE))
    sparse = int(BYTES_PER_ENTRY * entries * batch * steps) + tile
    if step_kernel in ("screened", "triton", "auto"):  # both matrices once more, in bfloat16
        sparse += 2 * (batch + d_sae) * d_in
    if step_kernel == "dense":
        return dense
    # "auto" tries the dense step where it could be faster, which it is not where little is active.
    could_be_dense = step_kernel == "auto" and entries > 0.05 * d_sae
    return max(sparse, dense) if could_be_dense else sparse


def calibration_bytes(batch: int, d_sae: int, *, transcoder: bool = False) -> int:
    """Temporaries while thresholds and bandwidth are measured on the first batch."""
    arrays = CALIBRATION_ARRAYS_TRANSCODER if transcoder else CALIBRATION_ARRAYS
    return int(arrays * FLOAT32 * batch * d_sae)


def rows_bytes(batch: int, width: int) -> int:
    """A batch's rows, for all hooks together."""
    return ROW_COPIES * FLOAT32 * batch * width


def forward_bytes(model: Any, width: int, context_size: int, sequences: int) -> int:
    """A forward pass of the model: the hooks, a block's own activations, attention scores.

    Args:
        width: of all hooks that are read, together.
    """
    sizes: Mapping[str, Any] = vars(getattr(model, "cfg", object)) if model is not None else {}
    d_model, d_mlp, heads = (sizes.get(name) or 0 for name in ("d_model", "d_mlp", "n_heads"))
    a_token = 2 * width + 3 * d_mlp + 8 * d_model + 3 * heads * context_size
    return FLOAT32 * sequences * context_size * a_token


def size(count: float) -> str:
    """A number of bytes, for reading."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
