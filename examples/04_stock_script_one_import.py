"""A script written for SAELens, stock config and stock runner, with one line added.

Losses and gradients stay SAELens' own; this package computes them, faster. Writes
./output/04_stock.
"""

import os

import torch
from sae_lens import (
    JumpReLUTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)

import jumprelu_plugin  # the line that was added

# These two stand in for a hub model and a hub dataset, so that the script runs without a network.
model = jumprelu_plugin.load_model("tiny-gemma-2")
text = jumprelu_plugin.tokenized_dataset(model.tokenizer, 128, split="train")

steps = int(os.environ.get("JUMPRELU_EXAMPLE_STEPS", "100"))
torch.manual_seed(0)
cfg = LanguageModelSAERunnerConfig(
    sae=JumpReLUTrainingSAEConfig(
        d_in=256,
        d_sae=1024,
        jumprelu_init_threshold=0.5,
        jumprelu_bandwidth=0.5,
        jumprelu_sparsity_loss_mode="tanh",
        l0_coefficient=1.0,
        l0_warm_up_steps=steps // 2,
        normalize_activations="expected_average_only_in",
    ),
    model_name="tiny-gemma-2",
    hook_name="blocks.3.hook_resid_post",
    training_tokens=steps * 1024,
    train_batch_size_tokens=1024,
    context_size=128,
    n_batches_in_buffer=128,
    n_batches_for_norm_estimate=10,
    exclude_special_tokens=True,
    lr=1e-3,
    checkpoint_path=None,
    output_path="output/04_stock",
    logger=LoggingConfig(log_to_wandb=False),
)
sae = LanguageModelSAETrainingRunner(cfg, override_dataset=text, override_model=model).run()
print(f"trained by {type(sae).__module__}.{type(sae).__name__}")

# Give the architecture back, and SAELens trains its own class again.
jumprelu_plugin.unregister()
print(f"registered: {jumprelu_plugin.is_registered()}")
jumprelu_plugin.register()
