"""Reads the explanations of a study's record."""

from __future__ import annotations

import json
from pathlib import Path


def read_explanations(path: str | Path, folder: str | Path) -> dict[int, str]:
    """The explanations of one SAE's latents.

    Args:
        path: explanations.json.
        folder: the SAE's folder.

    Raises:
        ValueError: the file is not there, is no such record, or explains no latent of the SAE.
    """
    path, wanted = Path(path), Path(folder).resolve()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        latents = record["result"]["latents"]
        found = {
            int(each["latent"]): str(each["explanation"])
            for each in latents
            if each["explanation"] and Path(each["folder"]).resolve() == wanted
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no record of `jumprelu study explain` ({type(error).__name__})"
        ) from None
    if not found:
        raise ValueError(f"{path} explains no latent of {folder}")
    return found
