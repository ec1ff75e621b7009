"""A rating study of two small SAEs on the embedded model, and one written by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from jumprelu_plugin.models.language_models import EMBEDDED_MODEL
from jumprelu_plugin.studies.rating.server import RatingServer
from tests.tiny import tiny_sae

HOOK = "blocks.2.hook_resid_post"
HOSTILE = ["</script><script>document.title='x'</script>", "<img src=x onerror=alert(1)>", "&amp;"]


def save_sae(folder: Path, seed: int, d_in: int = 256, model: str = EMBEDDED_MODEL) -> Path:
    """A random SAE with 43 latents; latent 5 never fires, latent 3 often."""
    sae = tiny_sae("blocks.1.hook_resid_post", d_in=d_in, d_sae=43, seed=seed)
    sae.cfg.metadata.hook_name = HOOK
    sae.cfg.metadata.model_name = model
    with torch.no_grad():
        sae.W_enc *= 0.02
        sae.threshold += 0.5
        sae.threshold[5], sae.threshold[3] = 1e6, 0.01
    sae.save_model(folder)
    return folder


def write_study(folder: Path, items: int = 7, raters: tuple[str, ...] = ("anna", "ben")) -> Path:
    """A rating set whose tokens are hostile, with every item for every rater."""
    contexts = [
        {"kind": "top", "pieces": [*HOSTILE, " text\n"], "shares": [0.0, 1.0, 0.4, 0.0]}
        for _ in "ab"
    ]
    study: dict[str, Any] = {
        "kind": "rating study",
        "study": "s1",
        "question": "One concept?",
        "items": {f"i{n}": {"contexts": contexts} for n in range(items)},
        "raters": {rater: [f"i{n}" for n in range(items)] for rater in raters},
    }
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(study))
    (folder / "ratings").mkdir()
    return folder


def write_key(path: Path, labels: list[str]) -> Path:
    """The key of `write_study`: item n is latent n of the SAE labels[n]."""
    items = {
        f"i{n}": {
            "label": label,
            "folder": f"/{label}",
            "architecture": label,
            "latent": n,
            "density": 0.01 * (n + 1),
            "stratum": 0,
        }
        for n, label in enumerate(labels)
    }
    key = {"kind": "rating key", "study": "s1", "settings": {}, "items": items, "provenance": {}}
    path.write_text(json.dumps(key))
    return path


def fork_server(folder: Path, port: int = 0) -> tuple[int, int]:
    """Start a server in a process that can be killed, and return its process id and port."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:  # only the standard library runs here
        server = RatingServer(folder, port)
        os.write(tell, str(server.server_port).encode())
        server.serve_forever(0.01)
    found = int(os.read(ready, 16))
    os.close(ready)
    os.close(tell)
    return child, found
