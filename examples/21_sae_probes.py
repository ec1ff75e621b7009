"""Sparse probing of a saved SAE with sae-probes, beside its logistic regression on activations.

    python 21_sae_probes.py [DATASET ...]

Run 01_train.py first. sae-probes brings 113 labeled data sets along and is installed without its
dependencies, which ask for older versions of pandas and pyarrow than it needs:

    pip install --no-deps sae-probes==0.4.2
    pip install "scikit-learn<1.10" xgboost-cpu zstandard

Writes sae-probes' own result files to ./output/21_sae_probes.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path

from rich import print
from rich.table import Table
from sae_lens import SAE

from jumprelu_plugin import load_model

try:
    from sae_probes import run_baseline_evals, run_sae_evals
    from sae_probes.generate_model_activations import ensure_dataset_activations
except ImportError as missing:
    sys.exit(
        f"{missing}. Run: pip install --no-deps sae-probes==0.4.2 && "
        'pip install "scikit-learn<1.10" xgboost-cpu zstandard'
    )

OUTPUT = Path("output/21_sae_probes")
DATASETS = sys.argv[1:] or ["125_world_country_Italy", "130_temp_cat_Frequency"]
KS = [1, 2, 5, 16]  # latents that a probe may use

# scikit-learn 1.8 and 1.9 take the argument `penalty` that sae-probes passes, and warn at each fit.
warnings.filterwarnings("ignore", message=".*penalty", module="sklearn")

# Unit decoder rows, as for SAEs that are downloaded: the penalty on a probe's weights depends on
# the scale of the latents.
sae = SAE.load_from_disk("output/01_train")
sae.fold_W_dec_norm()
name, hook = sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name
model = load_model(name)

# sae-probes loads a model of the hub by its name, unless the activations are there already: of each
# text's last token. Passing the model makes them without a network.
ensure_dataset_activations(
    name,
    DATASETS,
    [hook],
    OUTPUT / "activations",
    device="cpu",
    max_seq_len=model.cfg.n_ctx,
    model=model,
)
shutil.rmtree(OUTPUT / "results", ignore_errors=True)  # it keeps what is there, of an earlier SAE
where = {
    "model_name": name,
    "hook_name": hook,
    "setting": "normal",
    "datasets": DATASETS,
    "results_path": OUTPUT / "results",
    "model_cache_path": OUTPUT / "activations",
    "device": "cpu",
}
run_sae_evals(sae, reg_type="l1", ks=KS, **where)
run_baseline_evals(method="logreg", **where)

table = Table(title=f"test AUC on {name}, {hook}")
table.add_column("data set")
for column in (*(f"k = {k}" for k in KS), "all activations"):
    table.add_column(column, justify="right")
for dataset in DATASETS:
    probes, baseline = (
        json.loads((OUTPUT / "results" / f"{kind}_{name}/normal_setting" / file).read_text())
        for kind, file in (
            ("sae_probes", f"{dataset}_{hook}_l1.json"),
            ("baseline_results", f"{dataset}_{hook}_logreg.json"),
        )
    )
    table.add_row(dataset, *(f"{found['test_auc']:.3f}" for found in [*probes, *baseline]))
print(table)
