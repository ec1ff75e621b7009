"""sae-probes takes a saved SAE, and its probes are logistic regressions on the SAE's latents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE

from tests.dictionaries import needs
from tests.tiny import RESIDUAL, WIDTH, tiny_sae

DATASET, MODEL, KS = "119_us_state_TX", "tiny-gemma-2-test", [1, 3, 7]


def test_probes_on_a_saved_sae(tmp_path: Path) -> None:
    needs("sae_probes")
    from sae_probes import run_sae_evals
    from sae_probes.utils_data import get_train_test_indices, get_yvals
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    labels = get_yvals(DATASET)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(len(labels), WIDTH[RESIDUAL], generator=generator)
    x += 0.6 * torch.tensor(labels)[:, None] * torch.randn(WIDTH[RESIDUAL], generator=generator)
    stored = tmp_path / "activations" / f"model_activations_{MODEL}" / f"{DATASET}_{RESIDUAL}.pt"
    stored.parent.mkdir(parents=True)
    torch.save(x, stored)  # where it finds activations it asks for no model
    tiny_sae(RESIDUAL).save_model(tmp_path / "sae")
    sae = SAE.load_from_disk(tmp_path / "sae")
    run_sae_evals(
        sae,
        model_name=MODEL,
        hook_name=RESIDUAL,
        reg_type="l2",
        setting="normal",
        ks=KS,
        datasets=[DATASET],
        results_path=tmp_path / "results",
        model_cache_path=tmp_path / "activations",
        device="cpu",
    )
    (file,) = (tmp_path / "results").rglob("*.json")
    found = json.loads(file.read_text())
    assert [probe["k"] for probe in found] == KS

    # The split is sae-probes'; which latents and what a probe reaches are computed here.
    n_train = len(labels) - 100
    train, test = get_train_test_indices(labels, n_train, len(labels) - n_train - 1)
    with torch.no_grad():
        acts = sae.encode(x)
    fires = acts[train] / (acts[train].sum(0) / (acts[train] > 0).sum(0).clamp_min(1) + 1e-6)
    positive = torch.tensor(labels[train] == 1)
    order = (fires[positive].mean(0) - fires[~positive].mean(0)).abs().argsort(descending=True)
    for probe in found:
        chosen = order[: probe["k"]].tolist()
        assert probe["indices"] == chosen
        aucs = []
        for C in np.logspace(5, -5, 10):  # it chooses one of these penalties by validation
            own = LogisticRegression(C=C, max_iter=1000).fit(acts[train][:, chosen], labels[train])
            score = own.predict_proba(acts[test][:, chosen])[:, 1]
            aucs.append(roc_auc_score(labels[test], score))
        # Its solver sees the rows in another order; one pair of the 49 x 50 is 4e-4.
        assert min(abs(auc - probe["test_auc"]) for auc in aucs) < 1e-3
    assert found[0]["test_auc"] < found[-1]["test_auc"] > 0.8
