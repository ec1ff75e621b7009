"""Terms of the loss, each a field of the config: Matryoshka prefixes, penalties on dense latents.

Trains five SAEs on the same activations at the same L0. The plain one has no extra term. With
`matryoshka_widths` the first latents reconstruct much of the input alone, and fire on much of the
text to do so. With `density_penalty_scale` as well they fire less, and with `max_latent_density`,
which the recipe `default` has, none may fire often. The fifth SAE follows Anthropic's recipe of
January 2025, whose decoder rows are free in training and normalized at the end. Writes
./output/15_loss_terms.
"""

import os
from collections.abc import Iterator

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from jumprelu_plugin import (
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    get_recipe,
    load_model,
    tokenized_dataset,
)

STEPS = int(os.environ.get("JUMPRELU_EXAMPLE_STEPS", "150"))
BATCH, D_IN, D_SAE, FIRST, HOOK = 512, 256, 1024, 128, "blocks.3.hook_resid_post"

model = load_model("tiny-gemma-2")
text = tokenized_dataset(model.tokenizer, 128, split="test")
tokens = torch.tensor(text[:96]["tokens"])
with torch.no_grad():
    _, cache = model.run_with_cache(tokens, names_filter=[HOOK], stop_at_layer=4)
activations = cache[HOOK][:, 1:].flatten(0, 1)  # without BOS


def batches() -> Iterator[torch.Tensor]:
    order = torch.Generator().manual_seed(0)
    while True:
        yield activations[torch.randint(len(activations), (BATCH,), generator=order)]


def train(cfg: JumpReLUTrainingSAEConfig, lr: float, decay: int) -> JumpReLUTrainingSAE:
    torch.manual_seed(0)
    sae = JumpReLUTrainingSAE(cfg)
    trainer = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        n_batches_for_norm_estimate=16,
        lr=lr,
        lr_end=0.0,
        lr_decay_steps=decay,
        checkpoint_path=None,
    )
    SAETrainer(trainer, sae, data_provider=batches()).fit()
    return sae.eval()


@torch.no_grad()
def fvu(sae: JumpReLUTrainingSAE, latents: int) -> float:
    """Fraction of variance unexplained by the first latents alone."""
    x_hat = sae.encode(activations)[:, :latents] @ sae.W_dec[:latents] + sae.b_dec
    variance = (activations - activations.mean(0)).square().sum()
    return float((activations - x_hat).square().sum() / variance)


common = {"d_in": D_IN, "d_sae": D_SAE, "target_l0": 24}
nested = {**common, "matryoshka_widths": [FIRST, 512]}
configs = {
    "plain": JumpReLUTrainingSAEConfig(**common, matryoshka_loss_weight=0.0),
    "nested": JumpReLUTrainingSAEConfig(**nested),
    "both": JumpReLUTrainingSAEConfig(**nested, density_penalty_scale=0.01),
    "default": get_recipe("default").sae_config(**common),
}
for name, cfg in configs.items():
    sae = train(cfg, lr=3e-3, decay=STEPS // 5)
    with torch.no_grad():
        frequency = (sae.encode(activations) > 0).float().mean(0)
    print(
        f"{name:>6}: L0 {frequency.sum():.1f}, FVU {fvu(sae, D_SAE):.3f}, "
        f"of the first {FIRST} latents {fvu(sae, FIRST):.3f}, "
        f"{int((frequency > 0.1).sum())} latents on over 10 % of tokens"
    )
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = HOOK, "tiny-gemma-2"
    sae.save_inference_model(f"output/15_loss_terms/{name}")

# The recipe's own numbers. Only lr is raised for a run this short.
recipe = get_recipe("anthropic_2025")
cfg = recipe.sae_config(D_IN, D_SAE, target_l0=24, step_kernel="dense")
anthropic = train(cfg, lr=3e-3, decay=recipe.lr_decay_steps(STEPS))
before = anthropic(activations[:64])
anthropic.fold_W_dec_norm()
error = (anthropic(activations[:64]) - before).norm() / before.norm()
print(f"anthropic, decoder norms folded: the output differs by {error:.0e}")
