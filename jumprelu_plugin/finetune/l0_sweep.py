"""An L0 ladder: one trained SAE refitted to several L0s, each saved and judged.

Every rung is a stock SAELens folder of the same dictionary with other thresholds (and, where that
is asked for, a decoder or all parameters trained further). Its place between sparsity and fidelity
is measured on tokens it was not fitted on, and written as a line of JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.table import Table
from sae_lens import SAE, logger
from torch import Tensor

from jumprelu_plugin.evaluation import evaluate
from jumprelu_plugin.evaluation.metrics import Metrics, StreamingMetrics
from jumprelu_plugin.evaluation.splicing import evaluated_positions
from jumprelu_plugin.finetune import pretrained as released
from jumprelu_plugin.finetune.refit import RefitSettings, shifted, sweep_points
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.models.hooks import attached, flat_heads, flat_input
from jumprelu_plugin.records import append_jsonl, provenance, whole_folder
from jumprelu_plugin.saes.parameters import Parameters

RECORD_FILENAME = "ladder.jsonl"
# Further off than this on held-out tokens, and a rung is not what was asked for.
TOLERANCE = 0.03
_TOKENS_PER_ENCODE = 4096


@dataclass(frozen=True)
class SweepPoint:
    """One L0 that was asked for, and what the dictionary does there on held-out tokens.

    Attributes:
        folder: where it is saved, inside the ladder's folder.
        asked: the L0 asked for.
        l0, fvu, dead_share, share_above_10_percent: as `evaluation.metrics.Metrics` defines them.
        fvu_of_shift: FVU with one shift of all thresholds to this L0 and nothing trained.
        delta_loss: in nats; None where no model was given.
    """

    folder: str
    asked: float
    l0: float
    fvu: float
    fvu_of_shift: float
    dead_share: float
    share_above_10_percent: float
    delta_loss: float | None

    @property
    def off_by(self) -> float:
        """Share of the asked L0 that the measured one is off by."""
        return abs(self.l0 / self.asked - 1)


def run_l0_sweep(
    source: str | Path,
    targets: Sequence[float],
    output: str | Path,
    *,
    rows: Float[Tensor, "tokens d_in"],
    held_out: Float[Tensor, "tokens d_in"],
    settings: RefitSettings | None = None,
    model: Any = None,
    tokens: Int[Tensor, "sequences positions"] | None = None,
    log: Callable[[str], None] = logger.info,
) -> list[SweepPoint]:
    """Refit the SAE in `source` to every L0 of `targets`; the sweep_points from the lowest L0 up.

    Writes `output/l0_10` and so on, each as soon as it is finished, and a line of ladder.jsonl with
    it. Warns of a rung that is further from its L0 than 3 %, and of one that has more latents than
    the rung below and no less error.

    Args:
        source: a folder that `released.read` takes.
        rows: raw activations of its hook to fit on, in random order (`harvest`).
        held_out: activations to judge on.
        model, tokens: with both, the delta LM loss is measured too, on these tokens.
        log: takes a line before every rung.

    Raises:
        ValueError: `output` is not empty, the activations do not fit the dictionary, or a target is
            out of its reach.
        FileNotFoundError: there is no such source.
    """
    settings, output = settings or RefitSettings(), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty; give another folder")
    dictionary = released.read(source)
    for name, activations in (("rows", rows), ("held_out", held_out)):
        _check(name, activations, dictionary.parameters.d_in)
    found: list[SweepPoint] = []
    for target, parameters in sweep_points(
        dictionary.parameters, targets, rows, settings, lambda target: log(f"L0 {target:g} …")
    ):
        folder = output / f"l0_{target:g}"
        _save(dictionary, parameters, folder)
        at_once = shifted(dictionary.parameters, target, rows)
        loss = None
        # What was saved is what is judged: loaded by stock SAELens, as any other tool would.
        sae = SAE.load_from_disk(folder)
        if model is not None and tokens is not None:
            loss = evaluate(model, sae, tokens).delta_loss
        metrics = judged(sae, held_out)
        rung = SweepPoint(
            folder=folder.name,
            asked=target,
            l0=metrics.l0,
            fvu=metrics.fvu,
            fvu_of_shift=judged(_as_sae(dictionary, at_once), held_out).fvu,
            dead_share=metrics.dead_share,
            share_above_10_percent=metrics.share_above_10_percent,
            delta_loss=loss,
        )
        found.append(rung)
        record = {"kind": "l0_sweep", "source": str(source), **dataclasses.asdict(rung)}
        record |= {"settings": settings, "provenance": provenance(seed=settings.seed)}
        append_jsonl(output / RECORD_FILENAME, record)
    found.sort(key=lambda rung: rung.asked)
    for warning in warnings(found):
        logger.warning(warning)
    return found


@torch.no_grad()
def judged(sae: Any, held_out: Float[Tensor, "tokens d_in"]) -> Metrics:
    """L0, FVU and firing of an SAE on raw activations."""
    metrics = StreamingMetrics()
    with flat_input(sae):
        for x in held_out.split(_TOKENS_PER_ENCODE):
            x = x.float()
            acts = sae.encode(x)
            metrics.update(x, sae.decode(acts), acts)
    return metrics.compute()


@torch.no_grad()
def harvest(
    model: Any,
    hook: str,
    tokens: Int[Tensor, "sequences positions"],
    *,
    special_token_ids: Iterable[int] = (),
    batch_size: int = 32,
    seed: int = 0,
) -> Float[Tensor, "tokens d"]:
    """Activations at a hook, heads flattened, no special tokens; in random order, on the CPU.

    Raises:
        ValueError: the model has no such hook, or all tokens are special.
    """
    found: list[Tensor] = []
    special = sorted(set(special_token_ids))
    for text in tokens.to(model.cfg.device).split(batch_size):
        kept = evaluated_positions(text, special)

        def take(activation: Tensor, kept: Tensor = kept) -> None:
            found.append(flat_heads(activation)[kept.to(activation.device)].cpu())

        with attached(model, hook, take):
            model(text, return_type=None)
    rows = torch.cat(found)
    if not len(rows):
        raise ValueError(f"all {tokens.numel()} tokens are special: there is nothing to fit on")
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def numbers(text: str) -> tuple[float, ...]:
    """The L0s in a list such as "10,20,40"; raises ValueError where it is none."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"the L0s are {text!r}; give numbers such as 10,20,40") from None


def table(found: Sequence[SweepPoint]) -> Table:
    """The frontier, for people."""
    shown = Table(title="L0 ladder, on held-out tokens")
    columns = ("asked", "L0", "FVU", "FVU, thresholds shifted", "delta LM loss", "dead", "> 10 %")
    for column in columns:
        shown.add_column(column, justify="right")
    for rung in found:
        shown.add_row(
            f"{rung.asked:g}",
            f"{rung.l0:.2f}",
            f"{rung.fvu:.4f}",
            f"{rung.fvu_of_shift:.4f}",
            "-" if rung.delta_loss is None else f"{rung.delta_loss:.4f}",
            f"{rung.dead_share:.2%}",
            f"{rung.share_above_10_percent:.2%}",
        )
    return shown


def warnings(found: Sequence[SweepPoint]) -> list[str]:
    """What is wrong with sweep_points (from the lowest L0 up), and what to do."""
    said = [
        f"L0 {rung.asked:g} was asked for and is {rung.l0:.4g} on held-out tokens, "
        f"{rung.off_by:.1%} off: fit on more tokens, of the same kind of text"
        for rung in found
        if rung.off_by > TOLERANCE
    ]
    said += [
        f"L0 {rung.asked:g} has more error than with its thresholds shifted alone (FVU "
        f"{rung.fvu:.4f} and {rung.fvu_of_shift:.4f}): train for more steps, or with a lower lr"
        for rung in found
        if rung.fvu > 1.01 * rung.fvu_of_shift
    ]
    for lower, upper in zip(found, found[1:], strict=False):
        if upper.fvu >= lower.fvu:
            said.append(
                f"L0 {upper.asked:g} has no less error than L0 {lower.asked:g} (FVU "
                f"{upper.fvu:.4f} and {lower.fvu:.4f}): what lower thresholds let in is noise. "
                "Train the decoder or all parameters with them, for more steps"
            )
    return said


def _check(name: str, activations: Tensor, d_in: int) -> None:
    if activations.ndim != 2 or activations.shape[1] != d_in:
        raise ValueError(
            f"{name} has shape {tuple(activations.shape)}; the dictionary takes [tokens, {d_in}]"
        )
    if not torch.isfinite(activations).all():
        raise ValueError(
            f"{name} holds NaN or infinite activations; run the model in float32 or bfloat16, or "
            "leave out the tokens that overflow"
        )


def _as_sae(dictionary: Dictionary, parameters: Parameters) -> Any:
    return dataclasses.replace(dictionary, parameters=parameters).as_sae()


def _save(dictionary: Dictionary, parameters: Parameters, folder: Path) -> None:
    """Write a stock folder, whole or not at all."""
    with whole_folder(folder) as unfinished:
        _as_sae(dictionary, parameters).save_model(unfinished)
