"""Train a JumpReLU SAE with SAELens' own runner. The plugin adds one import and one config.

Writes ./output/01_train: a stock SAELens folder, which the next examples load.
JUMPRELU_EXAMPLE_STEPS=1000 in the environment trains longer.
"""

import os

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

from jumprelu_plugin import (  # importing the package registers it
    EMBEDDED_MODEL,
    JumpReLUTrainingSAEConfig,
    get_recipe,
    load_model,
    tokenized_dataset,
)

HOOK = "blocks.3.hook_resid_post"
D_SAE = 1024
TARGET_L0 = 32  # active latents a token
# Enough to see it work. Train for 1,000 steps or more to get latents that can be read.
STEPS = int(os.environ.get("JUMPRELU_EXAMPLE_STEPS", "100"))
BATCH = 1024  # tokens a step
CONTEXT = 128  # tokens a sequence
OUTPUT = "output/01_train"

# A Gemma 2 and English text that come with the package: nothing is downloaded.
model = load_model(EMBEDDED_MODEL)
text = tokenized_dataset(model.tokenizer, CONTEXT, split="train")

# SAELens does not use `seed` itself. Seed PyTorch to get the same run twice.
torch.manual_seed(0)

# Give the target L0 alone: thresholds, bandwidth and coefficient are then found from the data.
sae_cfg = JumpReLUTrainingSAEConfig(d_in=model.cfg.d_model, d_sae=D_SAE, target_l0=TARGET_L0)
recipe = get_recipe("default")
cfg = LanguageModelSAERunnerConfig(
    sae=sae_cfg,
    model_name=EMBEDDED_MODEL,
    hook_name=HOOK,
    training_tokens=STEPS * BATCH,
    train_batch_size_tokens=BATCH,
    context_size=CONTEXT,
    n_batches_in_buffer=128,  # 128 x CONTEXT activations are shuffled together
    n_batches_for_norm_estimate=10,
    exclude_special_tokens=True,
    lr=recipe.learning_rate(sae_cfg, STEPS * BATCH, BATCH),
    lr_decay_steps=recipe.lr_decay_steps(STEPS),
    dead_feature_window=STEPS // 5,
    checkpoint_path=None,
    output_path=OUTPUT,
    logger=LoggingConfig(log_to_wandb=False),
)
sae = LanguageModelSAETrainingRunner(cfg, override_dataset=text, override_model=model).run()

print(f"trained by {type(sae).__module__}.{type(sae).__name__}")
print(f"target L0 {TARGET_L0}; mean over the run {sae.cfg.metadata.l0:.1f}")
print(f"saved: {OUTPUT}")
