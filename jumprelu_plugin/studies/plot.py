"""Figures and a report from the records of sweeps and of interpretability studies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jumprelu_plugin.analysis.output_file import require_place_for_file
from jumprelu_plugin.records import read_json
from jumprelu_plugin.studies.explain import record as explanation_record
from jumprelu_plugin.studies.explain.report import explanation_sections
from jumprelu_plugin.studies.figures.groups import Record, Spread, architectures, places
from jumprelu_plugin.studies.figures.panel import Figure, require_matplotlib, save_figures
from jumprelu_plugin.studies.figures.settings import told_apart
from jumprelu_plugin.studies.figures.sweep import require_sweep, sweep_figures
from jumprelu_plugin.studies.rating import report as rating_report
from jumprelu_plugin.studies.report import Section, Table, write_report
from jumprelu_plugin.studies.sweep.record_file import read_records
from jumprelu_plugin.studies.sweep.run import RECORDS_FILENAME

REPORT_FILENAME = "report.html"
# By section, the figures' names.
_SECTIONS = {
    "Frontiers": ("frontier_delta_lm_loss", "frontier_fvu"),
    "Latents": ("latent_densities", "dense_latents", "dead_latents", "uniformity", "thresholds"),
    "Training": ("training_dynamics", "time_and_memory"),
}
_COLUMNS: dict[str, tuple[str, str]] = {
    "l0": ("L0", ".1f"),
    "fvu": ("FVU", ".4f"),
    "delta_lm_loss": ("delta LM loss", ".4f"),
    "dead_share": ("dead", ".1%"),
    "share_above_10_percent": ("dense", ".2%"),
    "uniformity": ("uniformity", ".3f"),
    "seconds": ("seconds", ".0f"),
}


def plot_sweep(
    sources: Sequence[str | Path],
    output_path: str | Path,
    *,
    more: Sequence[Section] = (),
    log: Callable[[str], None] = print,
) -> Path:
    """Draw every figure of the records in `sources` as PNG and SVG, and a page with all of them.

    Args:
        sources: files of records, or folders: of sweeps, of one study by a language model
            (`jumprelu study explain`) and of one report of ratings (`jumprelu study report`).
        output_path: folder for NAME.png, NAME.svg and report.html.
        more: further sections at the end of the page.
        log: told of a broken last line, which is left out.

    Returns:
        The page.

    Raises:
        ValueError: no records, records of something else, a broken line before the last, or two
            studies of one kind.
            Or report.html there is another's.
        FileNotFoundError: a source does not exist.
        ImportError: matplotlib, or for a study the `studies` extra, is not installed.
    """
    require_matplotlib()
    require_place_for_file(Path(output_path, REPORT_FILENAME), REPORT_FILENAME)
    paths = [_file(Path(source)) for source in sources]
    records = _records([path for path in paths if path.suffix != ".json"], log)
    studies = _study_sections([path for path in paths if path.suffix == ".json"])
    if not records and not studies:
        raise ValueError("there are no records to draw")
    figures = sweep_figures(records) if records else []
    swept = sweep_sections(records, figures) if records else []
    save_figures([*figures, *(f for section in studies for f in section.figures)], output_path)
    return write_report(
        Path(output_path, REPORT_FILENAME),
        "Sparse autoencoders compared",
        [*swept, *studies, *more],
        subtitle=_origin(records) if records else "",
    )


def _file(source: Path) -> Path:
    """The file of records that a source is or holds."""
    names = (RECORDS_FILENAME, explanation_record.RECORD_FILENAME, rating_report.RECORD_FILENAME)
    if not source.is_dir():
        return source
    return next((source / name for name in names if (source / name).exists()), source / names[0])


def _records(paths: Sequence[Path], log: Callable[[str], None]) -> list[Record]:
    """The records of sweeps, told apart by the settings in which they differ."""
    found: list[Record] = []
    for path in paths:
        records, broken = read_records(path)
        found += records
        if broken is not None:
            log(f"the last line of {path} is broken and left out")
    require_sweep(found)
    return told_apart(found)


def _study_sections(paths: Sequence[Path]) -> list[Section]:
    """The sections of studies, of which there may be one of each kind."""
    sections: dict[str, list[Section]] = {}
    for path in paths:
        kind = str(read_json(path).get("kind"))
        if kind in sections:
            raise ValueError(f"{path} is a second {kind}: a report holds one")
        if kind == explanation_record.KIND:
            result = explanation_record.read_explanation_result(path)
            sections[kind] = explanation_sections(result)
        elif kind == rating_report.KIND:
            sections[kind] = rating_report.rating_sections(rating_report.read_rating_result(path))
        else:
            raise ValueError(
                f"{path} holds a record of kind {kind!r}; expected {explanation_record.KIND!r} or "
                f"{rating_report.KIND!r}, or a file of lines as jumprelu sweep writes it"
            )
    return [section for own in sections.values() for section in own]


def sweep_sections(records: Sequence[Record], figures: Sequence[Figure]) -> list[Section]:
    """The report's sections of a sweep."""
    named = {figure.name: figure for figure in figures}
    sections = [
        Section(title, figures=[named[name] for name in names if name in named])
        for title, names in _SECTIONS.items()
    ]
    numbers = Section(
        "Numbers",
        ["Means over seeds. Dead latents fire on no held-out token, dense ones on more than 10 %."],
        tables=[_table(records)],
    )
    return [*(section for section in sections if section.figures), numbers]


def _table(records: Sequence[Record]) -> Table:
    columns = {n: c for n, c in _COLUMNS.items() if any(r.get(n) is not None for r in records)}
    rows: list[list[str]] = []
    for place, here in places(records).items():
        for architecture, own in architectures(here).items():
            for target in sorted({record["target_l0"] for record in own}):
                group = [record for record in own if record["target_l0"] == target]
                cells = [_mean(group, name, form) for name, (_, form) in columns.items()]
                rows.append([place, architecture, f"{target:g}", _seeds(group), *cells])
    header = ["site", "architecture", "target L0", "seeds", *(c for c, _ in columns.values())]
    return Table(header, rows)


def _seeds(records: Sequence[Record]) -> str:
    return str(len({record.get("seed") for record in records}))


def _mean(records: Sequence[Mapping[str, Any]], name: str, form: str) -> str:
    values = [record[name] for record in records if record.get(name) is not None]
    return format(Spread.of(values).mean, form) if values else "–"


def _origin(records: Sequence[Record]) -> str:
    """What the records are of, and where they come from."""
    models = sorted({str(record.get("model", "unknown model")) for record in records})
    sources: list[dict[str, Any]] = [record.get("provenance") or {} for record in records]
    commits = sorted({(s.get("git") or {}).get("commit", "")[:10] for s in sources} - {""})
    machines = sorted({(s.get("hardware") or {}).get("cpu") or "" for s in sources} - {""})
    parts = [f"{len(records)} SAEs of {', '.join(models)}"]
    if commits:
        parts.append(f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}")
    parts += machines
    return "; ".join(parts) + "."
