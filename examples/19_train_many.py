"""Train several SAEs in one pass over the text: the model runs once for all of them.

On the command line:

    jumprelu train-many --recipe default --model_name tiny-gemma-2 \\
        --hook_name blocks.1.hook_resid_post,blocks.3.hook_resid_post --target_l0 16,32 \\
        --d_sae 512 --training_tokens 819200 --output_path output/19_train_many

Each SAE is the one that its own run would train, bit for bit where the config fixes step_kernel.
Writes ./output/19_train_many, with a folder for each.
"""

import os
import shutil
from itertools import product
from pathlib import Path

from sae_lens import SAE, LanguageModelSAERunnerConfig, LoggingConfig

from jumprelu_plugin import (
    JumpReLUMultiTrainingRunner,
    corpus,
    get_recipe,
    load_model,
    tokenized_dataset,
)

STEPS = int(os.environ.get("JUMPRELU_EXAMPLE_STEPS", "400"))
BATCH = 512
OUTPUT = Path("output/19_train_many")
shutil.rmtree(OUTPUT, ignore_errors=True)  # a used output folder is refused

recipe = get_recipe("default")


def config(hook: str, target_l0: float) -> LanguageModelSAERunnerConfig:
    """What would train this SAE alone."""
    sae = recipe.sae_config(d_in=256, d_sae=512, target_l0=target_l0)
    return LanguageModelSAERunnerConfig(
        sae=sae,
        model_name="tiny-gemma-2",
        hook_name=hook,
        training_tokens=STEPS * BATCH,
        train_batch_size_tokens=BATCH,
        context_size=128,
        n_batches_in_buffer=32,
        n_batches_for_norm_estimate=5,
        exclude_special_tokens=True,
        lr=recipe.learning_rate(sae, STEPS * BATCH, BATCH),
        lr_decay_steps=recipe.lr_decay_steps(STEPS),
        checkpoint_path=None,
        output_path=str(OUTPUT),
        logger=LoggingConfig(log_to_wandb=False),
    )


hooks = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
configs = {f"{hook}-l0_{l0}": config(hook, l0) for hook, l0 in product(hooks, (16, 32))}

model = load_model("tiny-gemma-2")
text = tokenized_dataset(model.tokenizer, 128, "train", corpus()[:200])
JumpReLUMultiTrainingRunner(configs, text, model).run()

for name in configs:
    sae = SAE.load_from_disk(OUTPUT / name)  # stock SAELens
    print(f"{name}: {sae.cfg.d_sae} latents, L0 {sae.cfg.metadata.l0:.1f}")
