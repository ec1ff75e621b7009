"""One evaluation: its numbers, a table for people, a record for programs.

`evaluate` joins the losses of loss.py and the metrics of metrics.py; nothing else is computed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jaxtyping import Int
from rich.table import Table
from torch import Tensor

from jumprelu_plugin.evaluation.loss import delta_lm_loss
from jumprelu_plugin.evaluation.metrics import Metrics, StreamingMetrics
from jumprelu_plugin.evaluation.splicing import special_token_ids_of
from jumprelu_plugin.models.hooks import hook_point, sae_sites
from jumprelu_plugin.records import provenance as current_provenance
from jumprelu_plugin.records import write_json


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation(Metrics):
    """How faithful and how sparse one SAE is on one text. Losses are in nats per prediction.

    The quantities are defined in `LanguageModelLoss` and `Metrics`; `n_tokens` are the evaluated
    (not special) tokens and `n_predictions` the counted predictions, as splicing.py defines them.
    `hook_out` differs from `hook` for a transcoder only. `fraction_recovered` is None when mean
    ablation does not raise the loss.
    """

    model_name: str
    hook: str
    hook_out: str
    architecture: str
    d_in: int
    d_sae: int
    n_sequences: int
    n_predictions: int
    loss_clean: float
    loss_spliced: float
    loss_mean_ablated: float
    loss_zero_ablated: float
    delta_loss: float
    fraction_recovered: float | None

    def table(self) -> Table:
        """A rich table: print it with `rich.print` or a `Console`."""
        site = self.hook if self.hook == self.hook_out else f"{self.hook} -> {self.hook_out}"
        table = Table(
            title=f"{self.architecture} of width {self.d_sae:,} at {site}",
            caption=(
                f"{self.model_name}; {self.n_tokens:,} tokens in {self.n_sequences:,} sequences;"
                f" {self.n_predictions:,} predictions"
            ),
        )
        table.add_column("quantity")
        table.add_column("value", justify="right")
        recovered = self.fraction_recovered
        for name, value in (
            ("delta LM loss (nats)", f"{self.delta_loss:.4f}"),
            ("  loss, clean", f"{self.loss_clean:.4f}"),
            ("  loss, reconstruction spliced in", f"{self.loss_spliced:.4f}"),
            ("  loss, mean-ablated", f"{self.loss_mean_ablated:.4f}"),
            ("  loss, zero-ablated", f"{self.loss_zero_ablated:.4f}"),
            ("  fraction of loss recovered", "-" if recovered is None else f"{recovered:.4f}"),
            ("fraction of variance unexplained", f"{self.fvu:.4f}"),
            ("mean squared error per element", f"{self.mse:.4g}"),
            ("mean cosine similarity", f"{self.cosine:.4f}"),
            ("L0 (latents per token)", f"{self.l0:.2f}"),
            ("latents that never fired", f"{self.dead_share:.2%}"),
            ("latents firing on > 1 % of tokens", f"{self.share_above_1_percent:.2%}"),
            ("latents firing on > 10 % of tokens", f"{self.share_above_10_percent:.2%}"),
        ):
            table.add_row(name, value)
        return table

    def to_dict(self, frequencies: bool = False) -> dict[str, Any]:
        """Plain values under the field names; `firing_frequency` as a list with `frequencies`."""
        metrics = {field.name for field in fields(Metrics)}
        # What was evaluated comes first, where a reader of the record looks for it.
        ordered = sorted(fields(self), key=lambda field: field.name in metrics)
        record = {field.name: getattr(self, field.name) for field in ordered}
        frequency = record.pop("firing_frequency")
        return {**record, "firing_frequency": frequency.tolist()} if frequencies else record

    def save(
        self,
        path: str | Path,
        provenance: dict[str, Any] | None = None,
        *,
        frequencies: bool = False,
    ) -> Path:
        """Write `{"kind": "evaluation", "result": ..., "provenance": ...}` as a JSON record.

        `provenance` defaults to `records.provenance()` without seed and digests.
        """
        return write_json(
            path,
            {
                "kind": "evaluation",
                "result": self.to_dict(frequencies),
                "provenance": current_provenance() if provenance is None else provenance,
            },
        )


def evaluate(
    model: Any,
    sae: Any,
    tokens: Int[Tensor, "sequences positions"],
    *,
    batch_size: int = 8,
    special_token_ids: Iterable[int] | None = None,
    hook_in: str | None = None,
    hook_out: str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate `sae` on `tokens` where it sits in `model`: delta LM loss, then FVU, L0, firing.

    `model` is a HookedTransformer, HookedSAETransformer, TransformerBridge or SAETransformerBridge
    (with or without compatibility mode). `special_token_ids` defaults to the tokenizer's BOS, EOS,
    PAD, SEP and decoder-start, and what the SAE's metadata lists in `exclude_special_tokens`; pass
    `()` to count every token. The hooks default to the SAE's own, and its metadata's
    `hook_head_index` and `seqpos_slice` hold: one head is judged alone, and positions outside the
    slice are left as they are.
    `batch_size` is in sequences; each batch takes four forward passes. The model is left exactly
    as it was found. Source of the measures: arXiv 2407.14435, section 4.

    Raises ValueError for a hook the model does not have, an SAE that does not fit the hook's
    width, too few tokens, activations that are not finite (with the hook's name), and a model
    without a tokenizer when `special_token_ids` is not given.
    """
    if hook_in is None:
        hook_in, its_hook_out = sae_sites(sae)
        hook_out = hook_out or its_hook_out
    hook_out = hook_out or hook_in
    for hook in (hook_in, hook_out):
        hook_point(model, hook)
    metrics = StreamingMetrics()
    losses = delta_lm_loss(
        model,
        sae,
        tokens,
        hook_in=hook_in,
        hook_out=hook_out,
        special_token_ids=special_token_ids_of(model, special_token_ids, [sae]),
        batch_size=batch_size,
        observe=metrics.update,
        progress=progress,
    )
    found = metrics.compute()
    return Evaluation(
        model_name=model.cfg.model_name,
        hook=hook_in,
        hook_out=hook_out,
        architecture=sae.cfg.architecture(),
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        n_sequences=len(tokens),
        n_predictions=losses.n_predictions,
        loss_clean=losses.clean,
        loss_spliced=losses.spliced,
        loss_mean_ablated=losses.mean_ablated,
        loss_zero_ablated=losses.zero_ablated,
        delta_loss=losses.delta,
        fraction_recovered=losses.fraction_recovered,
        **{field.name: getattr(found, field.name) for field in fields(found)},
    )
