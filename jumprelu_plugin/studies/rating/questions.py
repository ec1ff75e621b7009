"""Makes the rating set: latents in blinded order for the raters, and the key apart from it.

What could tell one SAE from another is left out of what raters see: activations are shown as
shares of the latent's largest, and a latent's density, index, stratum and SAE are in the key alone.
"""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jumprelu_plugin.analysis.top_activations import collect_top_activations
from jumprelu_plugin.analysis.windows import WindowCounts, WindowKind, collect_windows
from jumprelu_plugin.models.digest import digest
from jumprelu_plugin.models.language_models import model_digest
from jumprelu_plugin.models.options import ModelOptions
from jumprelu_plugin.records import provenance, whole_folder, write_json
from jumprelu_plugin.studies.rating.settings import RatingStudySettings
from jumprelu_plugin.studies.sampling.latents import SampledLatent, stratified_latents
from jumprelu_plugin.studies.sampling.saes import StudySAE, load_study_saes
from jumprelu_plugin.studies.sampling.texts import TextWindow, text_windows

STUDY_FILENAME = "study.json"
RATINGS_FOLDER = "ratings"
QUESTION = "Do these texts show mostly one concept?"


def make_rating_study(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    key_path: str | Path | None = None,
    settings: RatingStudySettings | None = None,
    options: ModelOptions | None = None,
    context_size: int | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> tuple[Path, Path]:
    """Write a rating set to `output` and its key to another file, and return both paths.

    Args:
        folders: SAE folders, each `folder` or `label=folder`; see `load_study_saes`.
        output: the folder that `serve` reads.
        key_path: the key; beside `output`, as `<output>.key.json`, by default. It may not lie in
            `output`.
        settings: what the set holds.
        options: the model and the text.
        context_size: tokens in a sequence.
        log: called with lines of progress.

    Raises:
        ValueError: a setting is out of range, a rater would have no item, `output` or the key is
            already there, and as `load_study_saes` does.
    """
    settings, output = settings or RatingStudySettings(), Path(output)
    key_path = output.with_name(f"{output.name}.key.json") if key_path is None else Path(key_path)
    raters = _checked(settings, output, key_path)
    if folders:
        _require_items(len(folders) * settings.latents, raters, settings)
    with whole_folder(output, kind="rating study") as fresh:
        saes = load_study_saes(folders, options, context_size=context_size)
        _, tokens = saes[0].saved.sequences(settings.sequences)
        study = secrets.token_hex(8)
        items: dict[str, Any] = {}
        key: dict[str, Any] = {}
        for number, sae in enumerate(saes):
            log(f"{sae.label}: {sae.saved.folder} ({number + 1} of {len(saes)})")
            contexts = _contexts(sae, tokens, settings)
            if len(contexts) < settings.latents:
                log(f"{sae.label}: {len(contexts)} latents of {settings.latents}, all that fire")
            for drawn, windows in contexts:
                name = secrets.token_hex(8)
                items[name] = {"contexts": [_shown(window) for window in with_shares(windows)]}
                key[name] = {
                    "label": sae.label,
                    "folder": str(sae.saved.folder),
                    "architecture": sae.architecture,
                    **drawn.__dict__,
                }
        _require_items(len(key), raters, settings)
        deal = _deal(key, raters, settings)
        source = provenance(
            settings.seed, model_digest(saes[0].saved.model), data_digest=digest(tokens)
        )
        write_json(
            fresh / STUDY_FILENAME,
            # In random order: the order of the SAEs would unblind.
            {
                "kind": "rating study",
                "study": study,
                "question": QUESTION,
                "items": {name: items[name] for name in sorted(items)},
                "raters": deal,
            },
        )
        (fresh / RATINGS_FOLDER).mkdir()
        record = {"kind": "rating key", "study": study, "settings": settings, "items": key}
        write_json(key_path, {**record, "provenance": source})
    return output, key_path


def read_study(folder: str | Path) -> dict[str, Any]:
    """The rating set in `folder`.

    Raises:
        ValueError: there is none, or the file is not whole.
    """
    return _read(Path(folder) / STUDY_FILENAME, "rating study")


def read_key(path: str | Path) -> dict[str, Any]:
    """The key of a rating set.

    Raises:
        ValueError: the file is not there, not whole, or no key.
    """
    return _read(Path(path), "rating key")


def _read(path: Path, kind: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no {path}; `jumprelu study make` writes a {kind}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not whole: {error}") from None
    if not isinstance(found, dict) or found.get("kind") != kind:
        raise ValueError(f"{path} holds no {kind}")
    return found


def _checked(settings: RatingStudySettings, output: Path, key_path: Path) -> list[str]:
    if not 0 <= settings.overlap <= 1:
        raise ValueError(f"overlap is {settings.overlap}; give a share from 0 to 1")
    if settings.contexts < 2 or settings.sequences < 1:
        raise ValueError(
            f"contexts is {settings.contexts} and sequences {settings.sequences}; give at least 2 "
            "contexts and 1 sequence"
        )
    if settings.latents < 1 or settings.strata < 1:
        raise ValueError(
            f"latents is {settings.latents} and strata {settings.strata}; give at least 1 and 1"
        )
    if key_path.resolve().is_relative_to(output.resolve()):
        raise ValueError(
            f"the key {key_path} lies in {output}, which raters are given: put it elsewhere"
        )
    if key_path.exists():
        raise ValueError(f"{key_path} is there: it unblinds an earlier study; name another file")
    return settings.rater_names()


def _contexts(
    sae: StudySAE, tokens: Any, settings: RatingStudySettings
) -> list[tuple[SampledLatent, list[TextWindow]]]:
    model, dictionary = sae.saved.model, sae.saved.dictionary
    special = list(model.tokenizer.all_special_ids)
    top = collect_top_activations(model, dictionary, tokens, special_token_ids=special)
    drawn = stratified_latents(
        top.latent_density, settings.latents, strata=settings.strata, seed=settings.seed
    )
    counts = WindowCounts(top=(settings.contexts + 1) // 2, sampled=settings.contexts // 2)
    windows = collect_windows(
        model, dictionary, top, [each.latent for each in drawn], counts,
        special_token_ids=special, seed=settings.seed,
    )  # fmt: skip
    return list(zip(drawn, text_windows(windows, model.tokenizer), strict=True))


def with_shares(windows: Sequence[TextWindow]) -> list[TextWindow]:
    """The windows with activations as shares of the largest, in steps of 0.01."""
    largest = max((max(window.activations) for window in windows), default=0.0) or 1.0
    return [
        replace(w, activations=tuple(round(a / largest, 2) for a in w.activations)) for w in windows
    ]


def _shown(window: TextWindow) -> dict[str, Any]:
    return {
        "kind": "top" if window.kind == WindowKind.TOP else "sampled",
        "pieces": list(window.pieces),
        "shares": list(window.activations),
    }


def _common(items: int, raters: Sequence[str], settings: RatingStudySettings) -> int:
    """How many items every rater rates."""
    return round(settings.overlap * items) if len(raters) > 1 else 0


def _require_items(items: int, raters: Sequence[str], settings: RatingStudySettings) -> None:
    """Refuse a set that leaves a rater without items."""
    if items < len(raters) and _common(items, raters, settings) == 0:
        raise ValueError(
            f"{items} are too few latents for {len(raters)} raters: give more of them, "
            "fewer raters or a larger overlap"
        )


def _deal(
    items: Collection[str], raters: Sequence[str], settings: RatingStudySettings
) -> dict[str, list[str]]:
    """Each rater's items, in an order of their own.

    It follows from the items' names, which are random, and not from their order: the seed and the
    order of SAEs and strata would tell whoever knows them which item is of which.
    """
    draw = random.Random(settings.seed)
    shuffled = draw.sample(sorted(items), len(items))
    common = _common(len(shuffled), raters, settings)
    deal = {}
    for number, rater in enumerate(raters):
        own = shuffled[:common] + shuffled[common + number :: len(raters)]
        deal[rater] = draw.sample(own, len(own))
    return deal
