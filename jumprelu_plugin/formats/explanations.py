"""Explanations of latents in the record that `jumprelu study explain` writes, explanations.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jumprelu_plugin.records import read_json


@dataclass(frozen=True)
class Explanations:
    """Explanations of one SAE's latents.

    Attributes:
        texts: the explanation of each latent that has one.
        model: the name of the language model that wrote them.
    """

    texts: dict[int, str]
    model: str


def read_explanations(path: str | Path, folder: str | Path) -> Explanations:
    """The explanations of one SAE's latents.

    Args:
        path: explanations.json.
        folder: the SAE's folder.

    Raises:
        ValueError: the file is not there, is no such record, or explains no latent of the SAE.
    """
    path, wanted = Path(path), Path(folder).resolve()
    try:
        result = read_json(path)["result"]
        texts = {
            int(each["latent"]): str(each["explanation"])
            for each in result["latents"]
            if each["explanation"] and Path(each["folder"]).resolve() == wanted
        }
        model = str(result["backend"]["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no record of `jumprelu study explain` ({type(error).__name__})"
        ) from None
    if not texts:
        raise ValueError(f"{path} explains no latent of {folder}")
    return Explanations(texts, model)
