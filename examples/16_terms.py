"""Terms of the loss, each a field of the config: nested dictionaries, a price on frequent latents.

Trains four SAEs on the same activations at the same L0: plain; with `matryoshka_widths`, after
which the first latents rebuild much of the input on their own, by firing on much of the text; with
`density_penalty_scale` as well, after which they no longer do; and by the recipe `default`, with inner
dictionaries and a frequency ceiling. Then Anthropic's recipe of January 2025, whose decoder
is free while it trains and normalised at the end. Writes ./output/16_terms.
"""

import os
from collections.abc import Iterator

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.models.text import tokenized_dataset
from jumprelu_plugin.recipes import ANTHROPIC_2025, DEFAULT

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
    """Share of the variance that the first latents leave over."""
    x_hat = sae.encode(activations)[:, :latents] @ sae.W_dec[:latents] + sae.b_dec
    variance = (activations - activations.mean(0)).square().sum()
    return float((activations - x_hat).square().sum() / variance)


asked = {"d_in": D_IN, "d_sae": D_SAE, "target_l0": 24}
nested = {**asked, "matryoshka_widths": [FIRST, 512]}
configs = {
    "plain": JumpReLUTrainingSAEConfig(**asked, matryoshka_loss_weight=0.0),
    "nested": JumpReLUTrainingSAEConfig(**nested),
    "both": JumpReLUTrainingSAEConfig(**nested, density_penalty_scale=0.01),
    "default": DEFAULT.sae_config(**asked),
}
for name, cfg in configs.items():
    sae = train(cfg, lr=3e-3, decay=STEPS // 5)
    with torch.no_grad():
        frequency = (sae.encode(activations) > 0).float().mean(0)
    print(
        f"{name:>6}: L0 {frequency.sum():.1f}, FVU {fvu(sae, D_SAE):.3f}, "
        f"of the first {FIRST} latents {fvu(sae, FIRST):.3f}, "
        f"{int((frequency > 0.1).sum())} latents over 10 % of tokens"
    )
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = HOOK, "tiny-gemma-2"
    sae.save_inference_model(f"output/16_terms/{name}")

# The recipe's own numbers, but for the rate, which is raised for a run this short.
cfg = ANTHROPIC_2025.sae_config(D_IN, D_SAE, target_l0=24, step_kernel="dense")
anthropic = train(cfg, lr=3e-3, decay=ANTHROPIC_2025.decay_steps(STEPS))
before = anthropic(activations[:64])
anthropic.fold_W_dec_norm()
error = (anthropic(activations[:64]) - before).norm() / before.norm()
print(f"anthropic, rows made unit vectors: the output differs by {error:.0e}")
