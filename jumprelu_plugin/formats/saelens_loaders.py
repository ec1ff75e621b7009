"""Runs SAELens' loaders for published releases on a local folder.

These loaders request files from the hub by release and name. Here their two functions that do so
are replaced by ones that return files of a local folder. The loaders' own code then reads and
converts an export, and nothing is downloaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors import safe_open


@contextmanager
def hub_files_from(folder: Path) -> Iterator[None]:
    """Within the block, SAELens' loaders take every file from `folder` instead of the hub."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def find(repo_id: str, filename: str, **_: Any) -> str:
        return str(folder / Path(filename).name)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(find(repo_id, filename), framework="pt") as file:
            return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

    with (
        patch.object(loaders, "hf_hub_download", find),
        patch.object(loaders, "get_safetensors_tensor_shapes", shapes),
    ):
        yield


def load_with(
    loader: Callable[..., Any], repo_id: str, folder_name: str, overrides: dict[str, Any]
) -> Any:
    """Build an SAE with one of SAELens' loaders.

    Args:
        loader: a function of `sae_lens.loading.pretrained_sae_loaders`.
        repo_id: the release's name.
        folder_name: the SAE's folder in the release.
        overrides: config fields that the loader would read from the names.
    """
    from sae_lens import SAE

    def convert(**kwargs: Any) -> Any:
        cfg_overrides = {**(kwargs["cfg_overrides"] or {}), **overrides}
        return loader(**{**kwargs, "cfg_overrides": cfg_overrides})

    converter: Any = convert  # SAELens' type has positional parameters; it calls by keyword
    with warnings.catch_warnings():  # SAELens warns that it does not know the release's name
        warnings.simplefilter("ignore", UserWarning)
        sae, _, _ = SAE.from_pretrained_with_cfg_and_sparsity(
            repo_id, folder_name, converter=converter
        )
    return sae
