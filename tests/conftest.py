"""What every test runs under: no network, no wandb, one seed, few threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests import perturb

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # One of several workers (pytest -n): it leaves the other cores to the others, and so do the
    # processes that its tests start.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    torch.set_num_threads(2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--perturb", metavar="KIND", help="order:SEED, avx2 or scalar: see tests/perturb.py"
    )


def pytest_configure(config: pytest.Config) -> None:
    if kind := config.getoption("--perturb"):
        perturb.apply(kind, config)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order; and at a few thousand numbers a second thread costs more than it helps."""
    with single_thread():
        yield


@pytest.fixture(scope="module")
def one_thread_throughout() -> Iterator[None]:
    """As `one_thread`, and in what the fixtures of a module compute too."""
    with single_thread():
        yield


@contextmanager
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tokenized_once() -> Iterator[None]:
    """The factbook's 1.6 million tokens take the embedded model's tokenizer 4 s, and a dozen tests
    want them: what it made of the same documents before is given again."""
    from jumprelu_plugin.models import text
    from jumprelu_plugin.models.language_models import embedded_model_folder

    plain, known = text.token_stream, {}

    def token_stream(tokenizer: Any, documents: Any) -> list[int]:
        if tokenizer.name_or_path != str(embedded_model_folder()):
            return plain(tokenizer, documents)
        digest = text.documents_digest(documents)
        if digest not in known:
            known[digest] = plain(tokenizer, documents)
        return known[digest]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "token_stream", token_stream)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The random Gemma 2 of `tests.tiny`, in TransformerLens' class that takes SAEs."""
    from tests.tiny import tiny_hf, tiny_hooked, tiny_tokenizer  # slow; few tests need it

    return tiny_hooked(tiny_hf(), tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))
