"""Every numbered example runs, in the order of a reader who works through them in one folder."""

import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.dictionaries import needs

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("[0-9]*.py"))
STEPS = "7"
# Examples of other tools, which are not of this package's environment.
TOOL = {"20_saebench": "sae_bench", "21_sae_probes": "sae_probes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenized_once: None) -> Iterator[Path]:
    """Where all of them run. 01 has been run: what it trains is what others load."""
    folder = tmp_path_factory.mktemp("examples")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["example"])  # not pytest's own arguments
        patch.setenv("JUMPRELU_EXAMPLE_STEPS", STEPS)
        runpy.run_path(str(EXAMPLES[0]), run_name="__main__")
        yield folder
    torch.set_num_threads(threads)
    for number, handler in handlers.items():  # SAELens' runner leaves its own
        signal.signal(number, handler)


# In this process and not each in one of its own: importing PyTorch and SAELens takes 5 s.
@pytest.mark.parametrize("example", EXAMPLES[1:], ids=lambda path: path.stem)
def test_example_runs(example: Path, folder: Path) -> None:
    if example.stem in TOOL:
        needs(TOOL[example.stem])
    grad = torch.is_grad_enabled()
    before = set(Path("output").rglob("*"))
    runpy.run_path(str(example), run_name="__main__")
    assert Path.cwd() == folder == Path(os.getcwd())
    assert torch.is_grad_enabled() == grad
    assert set(Path("output").rglob("*")) > before


def test_the_first_example_wrote_what_it_says(folder: Path) -> None:
    assert {"cfg.json", "sae_weights.safetensors"} <= {
        path.name for path in (folder / "output" / "01_train").iterdir()
    }
