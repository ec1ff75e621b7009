"""Training on a·x + v is the same training in every runner, at the config's defaults.

The activations are moved in the model itself: `blocks.0.hook_resid_pre` is the sum of token and
position embeddings, and a synthetic model is linear in its features and its bias.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    HookedSAETransformer,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
)
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.synthetic.firing_probabilities import ConstantFiringProbabilityConfig
from sae_lens.synthetic.synthetic_model import SyntheticModel, SyntheticModelConfig
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunner, SyntheticSAERunnerConfig
from torch import Tensor
from transformer_lens import HookedTransformerConfig

from jumprelu_plugin import (
    FinetuningRunner,
    JumpReLUTrainingRunner,
    JumpReLUTrainingSAEConfig,
)

WIDTH, LATENTS, CONTEXT, VOCABULARY, BATCH, STEPS = 33, 61, 13, 53, 127, 40
SCALE = 0.013
HOOK = "blocks.0.hook_resid_pre"
TARGET = 5.0

pytestmark = pytest.mark.usefixtures("one_thread")


def offset() -> Tensor:
    """As long as 8 spreads of the moved activations: in float32, as most stores hold them, what is
    left of a token beside a longer mean is no longer the same token."""
    random = torch.Generator().manual_seed(9)
    return SCALE * 8 * torch.randn(WIDTH, generator=random, dtype=torch.float64)


def language_model(moved: bool) -> HookedSAETransformer:
    config = HookedTransformerConfig(
        n_layers=1,
        d_model=WIDTH,
        n_ctx=CONTEXT,
        d_head=11,
        n_heads=3,
        d_mlp=37,
        d_vocab=VOCABULARY,
        act_fn="relu",
        normalization_type="LN",
        seed=5,
        dtype=torch.float64,
        device="cpu",
    )
    model = HookedSAETransformer(config)
    random = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for weights in (model.embed.W_E, model.pos_embed.W_pos):
            drawn = torch.randn(weights.shape, generator=random, dtype=torch.float64)
            weights.copy_((SCALE if moved else 1.0) * drawn)
        if moved:
            model.pos_embed.W_pos += offset()
    return model


def text() -> Dataset:
    random = torch.Generator().manual_seed(7)
    return Dataset.from_dict(
        {"tokens": torch.randint(0, VOCABULARY, (300, CONTEXT), generator=random).tolist()}
    )


def activations(moved: bool) -> Tensor:
    _, cache = language_model(moved).run_with_cache(
        torch.tensor(text()["tokens"][:40]), names_filter=[HOOK]
    )
    return cache[HOOK].flatten(0, 1)


def sae_config(**fields: Any) -> JumpReLUTrainingSAEConfig:
    return JumpReLUTrainingSAEConfig(
        d_in=WIDTH, d_sae=LATENTS, target_l0=TARGET, **{"dtype": "float64", **fields}
    )


def common(folder: Path) -> dict[str, Any]:
    return {
        "training_tokens": STEPS * BATCH,
        "train_batch_size_tokens": BATCH,
        "context_size": CONTEXT,
        "store_batch_size_prompts": 17,
        "n_batches_in_buffer": 17,
        "n_batches_for_norm_estimate": 3,
        "lr": 3e-3,
        "dtype": "float64",
        "checkpoint_path": None,
        "output_path": str(folder),
        "logger": LoggingConfig(log_to_wandb=False),
    }


def runner_config(folder: Path, sae: JumpReLUTrainingSAEConfig) -> Any:
    return LanguageModelSAERunnerConfig(
        sae=sae, model_name="tiny", hook_name=HOOK, verbose=False, **common(folder)
    )


def assert_same(
    plain: Any, moved: Any, x: Tensor, moved_x: Tensor, v: Tensor, close: float = 1e-5
) -> None:
    """`moved` computes on `moved_x` = SCALE · x + v what `plain` computes on x, in its units."""
    with torch.no_grad():
        acts, moved_acts = plain.encode(x), moved.encode(moved_x)
        out, moved_out = plain.decode(acts), moved.decode(moved_acts)
    l0 = float((acts > 0).sum(1).double().mean())
    assert 0.6 * TARGET < l0 < 1.6 * TARGET
    torch.testing.assert_close(moved_acts / SCALE, acts, rtol=close, atol=close)
    torch.testing.assert_close((moved_out - v) / SCALE, out, rtol=close, atol=close)
    torch.testing.assert_close(moved.W_enc, plain.W_enc, rtol=close, atol=close)
    torch.testing.assert_close(moved.W_dec, plain.W_dec, rtol=close, atol=close)


def test_the_language_model_runner(tmp_path: Path) -> None:
    found = [
        JumpReLUTrainingRunner(
            runner_config(tmp_path / str(moved), sae_config()),
            override_model=language_model(moved),
            override_dataset=text(),
        ).run()
        for moved in (False, True)
    ]
    assert_same(*found, activations(False), activations(True), offset())


def test_the_multi_sae_runner(tmp_path: Path) -> None:
    found = [
        MultiSAETrainingRunner(
            MultiSAETrainingRunnerConfig(
                saes={"one": sae_config(), "other": sae_config(jumprelu_bandwidth_std=0.3)},
                hook_names=HOOK,
                **common(tmp_path / str(moved)),
            ),
            override_model=language_model(moved),
            override_dataset=text(),
        ).run()
        for moved in (False, True)
    ]
    for name in ("one", "other"):
        pair = (saes[name] for saes in found)
        assert_same(*pair, activations(False), activations(True), offset())


def pretrained(folder: Path, moved: bool) -> Path:
    """A saved SAE of known weights, in the units of either kind of activations."""
    random = torch.Generator().manual_seed(11)
    rows = torch.randn(LATENTS, WIDTH, generator=random, dtype=torch.float64)
    rows /= rows.norm(dim=1, keepdim=True)
    state = {
        "b_enc": 0.2 * torch.randn(LATENTS, generator=random, dtype=torch.float64),
        "b_dec": 0.3 * torch.randn(WIDTH, generator=random, dtype=torch.float64),
        "threshold": 1.7 + 0.4 * torch.rand(LATENTS, generator=random, dtype=torch.float64),
    }
    if moved:
        state = {name: SCALE * value for name, value in state.items()}
        state["b_dec"] += offset()
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=WIDTH, d_sae=LATENTS, dtype="float64"))
    sae.load_state_dict({"W_dec": rows, "W_enc": rows.t(), **state})
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = HOOK, "tiny"
    sae.save_model(folder)
    return folder


def test_the_finetuning_runner(tmp_path: Path) -> None:
    found = []
    for moved in (False, True):
        folder = tmp_path / str(moved)
        FinetuningRunner(
            pretrained(folder / "pretrained", moved),
            runner_config(folder / "output", sae_config()),
            text(),
            language_model(moved),
        ).run()
        found.append(SAE.load_from_disk(folder / "output"))
    assert_same(*found, activations(False), activations(True), offset())


def synthetic_model(moved: bool) -> SyntheticModel:
    model = SyntheticModel(
        SyntheticModelConfig(
            num_features=67,
            hidden_dim=WIDTH,
            firing_probability=ConstantFiringProbabilityConfig(probability=0.07),
            seed=3,
        )
    )
    if moved:
        with torch.no_grad():
            model.feature_dict.feature_vectors *= SCALE
            model.feature_dict.bias.mul_(SCALE).add_(offset().float())
    return model


def test_the_synthetic_runner() -> None:
    found, samples = [], []
    for moved in (False, True):
        torch.manual_seed(4)
        model = synthetic_model(moved)
        result = SyntheticSAERunner(
            SyntheticSAERunnerConfig(
                synthetic_model=model.cfg,
                sae=sae_config(dtype="float32"),
                training_samples=STEPS * BATCH,
                batch_size=BATCH,
                lr=3e-3,
                eval_samples=530,
                output_path=None,
                checkpoint_path=None,
                n_batches_for_norm_estimate=3,
                logger=LoggingConfig(log_to_wandb=False),
            ),
            override_synthetic_model=model,
        ).run()
        found.append(result.sae)
        torch.manual_seed(8)
        samples.append(model.sample(500))
    # In float32, as SAELens samples: a bit of a token eight spreads out is 5e-7 of a spread.
    assert_same(*found, *samples, offset().float(), close=2e-3)
