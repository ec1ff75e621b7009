"""Check a run before it starts, and read the alarms of one that goes wrong.

The check takes a forward pass and one step of a copy of the SAE; `jumprelu check` prints the same
as a table. One config here is refused. Started without the check, it raises an alarm that says what
to change. Writes ./output/14_monitoring.
"""

import json
import os
import shutil
from pathlib import Path

from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

from jumprelu_plugin import (
    JumpReLUTrainingRunner,
    JumpReLUTrainingSAEConfig,
    corpus,
    load_model,
    tokenized_dataset,
)

# The monitor looks for alarms every 100 steps.
STEPS = max(200, int(os.environ.get("JUMPRELU_EXAMPLE_STEPS", "200")))
FOLDER = Path("output/14_monitoring")
shutil.rmtree(FOLDER, ignore_errors=True)  # a used output folder is refused

model = load_model("tiny-gemma-2")
text = tokenized_dataset(model.tokenizer, 128, "train", corpus()[:100])


def runner(name: str, check_first: bool = True, **sae) -> JumpReLUTrainingRunner:
    cfg = LanguageModelSAERunnerConfig(
        sae=JumpReLUTrainingSAEConfig(d_in=256, d_sae=512, step_kernel="sparse", **sae),
        model_name="tiny-gemma-2",
        hook_name="blocks.3.hook_resid_post",
        training_tokens=STEPS * 128,
        train_batch_size_tokens=128,
        context_size=128,
        n_batches_in_buffer=64,
        n_batches_for_norm_estimate=5,
        exclude_special_tokens=True,
        lr=3e-3,
        dead_feature_window=STEPS // 5,
        checkpoint_path=None,
        output_path=str(FOLDER / name),
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return JumpReLUTrainingRunner(
        cfg, override_dataset=text, override_model=model, check_first=check_first
    )


# A target alone: windows, thresholds and coefficient come from the data.
report = runner("healthy", target_l0=32).preflight()
print(f"{report.steps} steps, {report.memory.peak / 1e9:.2f} GB at the peak")
print(f"{report.first.occupancy:.1%} of the tokens train a threshold; findings: {report.findings}")

# SAELens' default numbers: the penalty dominates the error.
stock = {"jumprelu_init_threshold": 0.01, "jumprelu_bandwidth": 0.05, "l0_coefficient": 1.0}
for finding in runner("stock", **stock).preflight().findings:
    print(f"{finding.severity}: {finding}")

# A window that holds no token.
narrow = {"target_l0": 32, "jumprelu_bandwidth": 1e-9}
try:
    runner("narrow", **narrow).run()
except ValueError as refusal:
    print(f"refused: {refusal}")

# Without the check it runs, and raises an alarm: on the console, in metrics.jsonl, on wandb.
runner("narrow", check_first=False, **narrow).run()
for line in (FOLDER / "narrow" / "metrics.jsonl").read_text().splitlines():
    record = json.loads(line)
    if "alarm" in record:
        print(
            f"step {record['step']}, {record['alarm']}: {record['message']}; {record['suggestion']}"
        )
