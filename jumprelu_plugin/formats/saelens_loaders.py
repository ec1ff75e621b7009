"""Run SAELens' loaders for published releases on a folder of this machine.

They ask the hub for a file by release and name. Here the question is answered from a folder, so
that the loader's own code reads and converts what was written; nothing is downloaded.
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
def redirected(folder: Path) -> Iterator[None]:
    """Within the block SAELens' loaders find every file they ask for in `folder`."""
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
    """The SAE that SAELens builds from what one of its loaders returns."""
    from sae_lens import SAE

    def convert(**asked: Any) -> Any:
        return loader(**{**asked, "cfg_overrides": {**(asked["cfg_overrides"] or {}), **overrides}})

    converter: Any = convert  # SAELens calls it by keyword; its type asks for positions too
    with warnings.catch_warnings():  # of the release's name, which is only a name here
        warnings.simplefilter("ignore", UserWarning)
        sae, _, _ = SAE.from_pretrained_with_cfg_and_sparsity(
            repo_id, folder_name, converter=converter
        )
    return sae
