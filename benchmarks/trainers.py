"""The trainers that the speed benchmark times, each at a given shape and L0.

The steps of SAELens' architectures and of this package's are those of SAELens' `SAETrainer.step`:
forward and backward pass, statistics, gradient clipping, Adam and schedules. A step of
dictionary_learning's trainer is its `update`, which does the same. Other packages are imported, not
copied.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol

import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE as StockJumpReLU
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.step.activity import mean_l0

BANDWIDTH = 0.05
L0_COEFFICIENT = 1e-3
# So small that L0 does not change while a trainer is timed.
LEARNING_RATE = 1e-7


@dataclass(frozen=True)
class Shape:
    """The sizes of a step, the mean number of active latents, and where the step runs."""

    d_in: int
    d_sae: int
    batch: int
    l0: float
    device: str = "cpu"


class TimedTrainer(Protocol):
    """A trainer that takes one step at a time."""

    def step(self) -> None:
        """Take one training step."""

    def forward_backward(self) -> None:
        """Run the forward and the backward pass only."""

    def l0(self) -> float | None:
        """Mean number of active latents on the timed batch; None before the first step."""


def activations(shape: Shape) -> Tensor:
    """Gaussian activations, [batch, d_in]; a step's time depends only on shape and L0."""
    drawn = torch.randn(shape.batch, shape.d_in, generator=torch.Generator().manual_seed(0))
    return drawn.to(shape.device)


class _SAELens:
    """An SAELens training SAE in SAELens' own trainer."""

    def __init__(self, sae: Any, shape: Shape, autocast: bool = False):
        self.sae, self.x = sae.to(shape.device), activations(shape)
        if hasattr(sae, "threshold"):
            z = (self.x[:256] - sae.b_dec) @ sae.W_enc + sae.b_enc
            sae.threshold.data.fill_(_quantile(z.detach(), shape))
        self.trainer = SAETrainer(
            cfg=SAETrainerConfig(
                total_training_samples=10**9,
                train_batch_size_samples=shape.batch,
                lr=LEARNING_RATE,
                lr_end=LEARNING_RATE,
                device=shape.device,
                autocast=autocast,
            ),
            sae=sae,
            data_provider=repeat(self.x),
        )
        self._active: Tensor | None = None

    def step(self) -> None:
        self._active = self.trainer.step(self.x).feature_acts
        self.trainer.n_training_steps += 1

    def forward_backward(self) -> None:
        with self.trainer.autocast_if_enabled:
            output = self.sae.training_forward_pass(
                step_input=TrainStepInput(
                    sae_in=self.x,
                    coefficients=self.trainer.get_coefficients(),
                    dead_neuron_mask=self.trainer.dead_neurons,
                    n_training_steps=self.trainer.n_training_steps,
                    is_logging_step=False,
                )
            )
        output.loss.backward()
        self.trainer.optimizer.zero_grad()

    def l0(self) -> float | None:
        if self._active is None:
            return None
        return mean_l0(self._active)


class _DictionaryLearning:
    """dictionary_learning's JumpReLU trainer."""

    def __init__(self, shape: Shape):
        JumpReluTrainer = _dictionary_learning_trainer()
        self.x = activations(shape)
        self.trainer = JumpReluTrainer(
            steps=10**6,
            activation_dim=shape.d_in,
            dict_size=shape.d_sae,
            layer=0,
            lm_name="none",
            lr=LEARNING_RATE,
            bandwidth=BANDWIDTH,
            sparsity_penalty=L0_COEFFICIENT,
            target_l0=shape.l0,
        )
        ae = self.trainer.ae
        z = (self.x[:256] @ ae.W_enc + ae.b_enc).detach()
        ae.threshold.data.fill_(_quantile(z, shape))
        self._steps = 0

    def step(self) -> None:
        self.trainer.update(self._steps, self.x)
        self._steps += 1

    def forward_backward(self) -> None:
        self.trainer.loss(self.x, step=self._steps).backward()
        self.trainer.optimizer.zero_grad()

    def l0(self) -> float | None:
        with torch.no_grad():
            return float((self.trainer.ae.encode(self.x[:256]) > 0).sum()) / len(self.x[:256])


def _quantile(z: Tensor, shape: Shape) -> float:
    """The threshold that on average L0 of a token's pre-activations z exceed."""
    above = max(1, round(shape.l0 / shape.d_sae * z.numel()))
    return float(z.flatten().kthvalue(z.numel() - above).values)


def _plugin(path: str) -> Callable[[Shape], TimedTrainer]:
    def make(shape: Shape) -> TimedTrainer:
        cfg = JumpReLUTrainingSAEConfig(
            **_sizes(shape),
            jumprelu_init_threshold=0.1,
            jumprelu_bandwidth=BANDWIDTH,
            l0_coefficient=L0_COEFFICIENT,
            jumprelu_ste_to_input=False,
            step_kernel=path,  # type: ignore[arg-type]
        )
        return _SAELens(JumpReLUTrainingSAE(cfg), shape)

    return make


def _default_config(shape: Shape) -> TimedTrainer:
    """Only the target L0 is set; L0 control and the rest are defaults."""
    sizes = {"d_in": shape.d_in, "d_sae": shape.d_sae, "device": shape.device}
    return _SAELens(
        JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**sizes, target_l0=shape.l0)), shape
    )


def _stock_jumprelu(shape: Shape, autocast: bool = False) -> TimedTrainer:
    cfg = sae_lens.JumpReLUTrainingSAEConfig(
        **_sizes(shape),
        jumprelu_init_threshold=0.1,
        jumprelu_bandwidth=BANDWIDTH,
        l0_coefficient=L0_COEFFICIENT,
    )
    return _SAELens(StockJumpReLU(cfg), shape, autocast)


def _topk(shape: Shape, *, sparse: bool) -> TimedTrainer:
    cfg = sae_lens.TopKTrainingSAEConfig(
        **_sizes(shape),
        k=round(shape.l0),
        use_sparse_activations=sparse,
        # With it, the backward pass of sparse activations fails on a CPU (SAELens 6.54.12).
        rescale_acts_by_decoder_norm=not sparse,
    )
    return _SAELens(sae_lens.TopKTrainingSAE(cfg), shape)


def _batchtopk(shape: Shape) -> TimedTrainer:
    cfg = sae_lens.BatchTopKTrainingSAEConfig(**_sizes(shape), k=shape.l0)
    return _SAELens(sae_lens.BatchTopKTrainingSAE(cfg), shape)


def _gated(shape: Shape) -> TimedTrainer:
    return _SAELens(
        sae_lens.GatedTrainingSAE(sae_lens.GatedTrainingSAEConfig(**_sizes(shape))), shape
    )


def _standard(shape: Shape) -> TimedTrainer:
    return _SAELens(
        sae_lens.StandardTrainingSAE(sae_lens.StandardTrainingSAEConfig(**_sizes(shape))), shape
    )


def _sizes(shape: Shape) -> dict[str, Any]:
    sizes = {"d_in": shape.d_in, "d_sae": shape.d_sae, "device": shape.device}
    return {**sizes, "normalize_activations": "none"}


class _Sparsify:
    """sparsify's TopK coder with Adam, as its trainer steps it."""

    def __init__(self, shape: Shape):
        from sparsify import SparseCoder, SparseCoderConfig  # type: ignore[import-not-found]

        self.x = activations(shape)
        cfg = SparseCoderConfig(num_latents=shape.d_sae, k=round(shape.l0))
        self.coder = SparseCoder(shape.d_in, cfg, device=shape.device)
        self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=LEARNING_RATE)

    def step(self) -> None:
        self.coder(self.x).fvu.backward()
        torch.nn.utils.clip_grad_norm_(self.coder.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward_backward(self) -> None:
        self.coder(self.x).fvu.backward()
        self.optimizer.zero_grad()

    def l0(self) -> float | None:
        return float(self.coder.cfg.k)


STOCK = "SAELens jumprelu"
SPARSE = "jumprelu-plugin, sparse"
SCREENED = "jumprelu-plugin, screened"
DENSE = "jumprelu-plugin, dense"
AUTO = "jumprelu-plugin, auto"
DEFAULT_CONFIG = "jumprelu-plugin, default config"

TRAINERS: dict[str, Callable[[Shape], TimedTrainer]] = {
    SPARSE: _plugin("sparse"),
    SCREENED: _plugin("screened"),
    DENSE: _plugin("dense"),
    AUTO: _plugin("auto"),
    DEFAULT_CONFIG: _default_config,
    STOCK: _stock_jumprelu,
    "SAELens topk": lambda shape: _topk(shape, sparse=False),
    "SAELens topk, sparse activations": lambda shape: _topk(shape, sparse=True),
    "SAELens batchtopk": _batchtopk,
    "SAELens gated": _gated,
    "SAELens standard": _standard,
    "dictionary_learning JumpReLU": _DictionaryLearning,
}


TRITON = "jumprelu-plugin, triton"
TOPK_SPARSE = "SAELens topk, sparse activations"
SPARSIFY = "sparsify TopK"
STOCK_TF32 = "SAELens jumprelu, TF32"
STOCK_AUTOCAST = "SAELens jumprelu, bf16 autocast"
# What only a GPU has: kernels for it, and matrix products in fewer bits.
GPU_TRAINERS: dict[str, Callable[[Shape], TimedTrainer]] = {
    TRITON: _plugin("triton"),
    STOCK_TF32: _stock_jumprelu,
    STOCK_AUTOCAST: lambda shape: _stock_jumprelu(shape, autocast=True),
    SPARSIFY: _Sparsify,
}


def missing_trainers() -> dict[str, str]:
    """The trainers whose package is not installed, and what to do about it."""
    try:
        _dictionary_learning_trainer()
    except ImportError as error:
        install = "pip install --no-deps dictionary-learning==0.1.0"
        return {"dictionary_learning JumpReLU": f"{error}; {install}"}
    return {}


def _dictionary_learning_trainer() -> Any:
    # Its __init__ imports nnsight for an activation buffer that is not used here, and nnsight
    # replaces Tensor.backward, which would change the times of all trainers.
    real = sys.modules.get("nnsight")
    empty = types.ModuleType("nnsight")
    empty.LanguageModel = None  # type: ignore[attr-defined]
    sys.modules["nnsight"] = empty
    try:
        from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    finally:
        if real is None:
            del sys.modules["nnsight"]
        else:
            sys.modules["nnsight"] = real
    return JumpReluTrainer
