"""Recipes are published hyper-parameters as data, each with the units it was published in.

Gemma Scope gives θ, ε and λ for activations scaled to E‖x‖² = 1; SAELens scales to E‖x‖ = √d_in.
`hyperparameter_units` says which one a recipe means. Here one recipe trains on activations and on
the same activations times ten: the encoder comes out ten times smaller, the decoder ten times
larger, and the latents are the same. Writes ./output/06_recipes.
"""

import os
from collections.abc import Iterator

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from jumprelu_plugin import (
    RECIPES,
    JumpReLUTrainingSAE,
    get_recipe,
    load_model,
    tokenized_dataset,
)

STEPS = int(os.environ.get("JUMPRELU_EXAMPLE_STEPS", "40"))
BATCH, D_SAE, HOOK = 512, 512, "blocks.3.hook_resid_post"
recipe = get_recipe("gemma_scope")

for one in RECIPES.values():
    print(f"{one.name}: {one.source}\n  {dict(one.sae)}\n  {dict(one.runner)}")

model = load_model("tiny-gemma-2")
text = tokenized_dataset(model.tokenizer, 128, split="test")
tokens = torch.tensor(text[:64]["tokens"])
_, cache = model.run_with_cache(tokens, names_filter=[HOOK])
activations = cache[HOOK][:, 1:].flatten(0, 1)  # without BOS


def batches(scale: float) -> Iterator[torch.Tensor]:
    order = torch.Generator().manual_seed(0)
    while True:
        yield scale * activations[torch.randint(len(activations), (BATCH,), generator=order)]


def train(scale: float) -> JumpReLUTrainingSAE:
    torch.manual_seed(0)
    # The recipe's own numbers. Only lr, below, is raised for a run this short.
    sae = JumpReLUTrainingSAE(recipe.sae_config(256, D_SAE, step_kernel="sparse"))
    cfg = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        n_batches_for_norm_estimate=16,
        adam_beta1=recipe.runner["adam_beta1"],
        lr=1e-3,
        lr_end=1e-4,
        checkpoint_path=None,
    )
    SAETrainer(cfg, sae, data_provider=batches(scale)).fit()
    return sae.eval()  # the input scale is folded into the weights: it reads raw activations


once, tenfold = train(1.0), train(10.0)
for name in ("W_enc", "W_dec", "b_dec", "threshold"):
    ratio = getattr(tenfold, name).norm() / getattr(once, name).norm()
    print(f"{name:>9} x {ratio:.4f}")
acts, expected = tenfold.encode(10 * activations), once.encode(activations)
print(f"the latents differ by {(acts - expected).norm() / expected.norm():.1e}")

once.cfg.metadata.hook_name, once.cfg.metadata.model_name = HOOK, "tiny-gemma-2"
once.save_inference_model("output/06_recipes")
