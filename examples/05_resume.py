"""Stop a run and resume it: it ends with the same weights, bit for bit.

Ctrl-C or a SIGTERM ends a run of `JumpReLUTrainingRunner` after the current step, saves a
checkpoint like the one made here, and prints how to resume. Writes ./output/05_resume.
"""

import os
import shutil
from pathlib import Path

import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

from jumprelu_plugin import (
    JumpReLUTrainingRunner,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    corpus,
    load_model,
    tokenized_dataset,
)

STEPS = int(os.environ.get("JUMPRELU_EXAMPLE_STEPS", "40"))
FOLDER = Path("output/05_resume")
shutil.rmtree(FOLDER, ignore_errors=True)  # a used output folder is refused


def config(name: str, **fields) -> LanguageModelSAERunnerConfig:
    # "auto" takes whichever kernel is fastest at the time, and kernels round differently: fix one
    # to repeat a run bit for bit.
    sae = JumpReLUTrainingSAEConfig(d_in=256, d_sae=512, target_l0=32, step_kernel="sparse")
    return LanguageModelSAERunnerConfig(
        sae=sae,
        model_name="tiny-gemma-2",
        hook_name="blocks.3.hook_resid_post",
        training_tokens=STEPS * 512,
        train_batch_size_tokens=512,
        context_size=128,
        n_batches_in_buffer=32,
        n_batches_for_norm_estimate=5,
        exclude_special_tokens=True,
        lr=1e-3,
        checkpoint_path=str(FOLDER / "checkpoints"),
        output_path=str(FOLDER / name),
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
        **fields,
    )


model = load_model("tiny-gemma-2")
text = tokenized_dataset(model.tokenizer, 128, "train", corpus()[:200])


def run(cfg: LanguageModelSAERunnerConfig) -> JumpReLUTrainingSAE:
    return JumpReLUTrainingRunner(cfg, override_dataset=text, override_model=model).run()


whole = run(config("whole", n_checkpoints=1))
(checkpoint,) = FOLDER.glob("checkpoints/*/*")
print(f"resuming from {checkpoint}:")
for file in sorted(checkpoint.iterdir()):
    print(f"  {file.stat().st_size:>10,} bytes  {file.name}")

# On the command line: jumprelu train ... --resume_from_checkpoint CHECKPOINT, or auto, which takes
# the newest of the same run.
resumed = run(config("resumed", resume_from_checkpoint=str(checkpoint)))
for name, value in resumed.state_dict().items():
    assert torch.equal(value, whole.state_dict()[name]), name
print("the resumed run has the weights of the uninterrupted one")
