"""A transformers model on this machine as explainer, simulator and judge.

Explanations are written by greedy decoding. Simulation and judging read probabilities instead of
text, which a small model does better: all activations of a text are predicted in one forward pass,
as Bills et al. 2023 do it for many tokens at once, by the expected digit after each token's tab; a
judgement is the probability of yes against no.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.models.packaged import read_gguf, smollm2_file
from jumprelu_plugin.studies.explain.calls import CallLog
from jumprelu_plugin.studies.explain.prompts import MARKED_SHARE, marked_text, read_explanation
from jumprelu_plugin.studies.explain.roles import JudgeTask, Roles, SimulationTask
from jumprelu_plugin.studies.explain.settings import SMOLLM2, BackendSettings
from jumprelu_plugin.studies.sampling.texts import TextWindow

NEW_TOKENS = 24
# In the explainer's prompt: a small model loses the question in more texts.
_MOST_EXAMPLES = 6
_UNKNOWN = "unknown"

EXPLAIN_PROMPT = (
    "Marked words: I saw a <<cat>> on the wall | two <<dogs>> and a <<parrot>>\n"
    "What the marked words share: animals\n\n"
    "Marked words: on <<Monday>> we left | closed until <<Friday>>\n"
    "What the marked words share: days of the week\n\n"
    "Marked words: {texts}\n"
    "What the marked words share:"
)
SIMULATE_PROMPT = (
    "A neuron is active, from 0 to 9, on the tokens that its explanation names. Most are at 0.\n\n"
    "Explanation: animals\n"
    "I\t0\n saw\t0\n a\t0\n cat\t9\n on\t0\n the\t0\n wall\t0\n\n"
    "Explanation: days of the week\n"
    " closed\t0\n until\t1\n Friday\t9\n at\t0\n noon\t0\n\n"
    "Explanation: {explanation}\n"
)
DETECT_PROMPT = 'Does the text mention "{explanation}"? Answer yes or no.\n'
FUZZ_PROMPT = 'Do the words between << and >> fit "{explanation}"? Answer yes or no.\n'


class LocalModel:
    """A causal language model, its tokenizer, and the log that answers repeated requests.

    Args:
        name: the model's name in the log.
        model: a transformers model.
        tokenizer: of the model.
        log: answers repeated requests.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, log: CallLog) -> None:
        self._name, self._model, self._tokenizer, self._log = name, model, tokenizer, log
        self._digits = [self._ids(str(digit))[-1] for digit in range(10)]
        self._yes, self._no = self._ids(" yes")[-1], self._ids(" no")[-1]

    def explain(self, tasks: Sequence[Sequence[TextWindow]]) -> list[str | None]:
        """See `Explainer`."""
        return [read_explanation(self._generate(explain_prompt(task))) for task in tasks]

    def simulate(self, tasks: Sequence[SimulationTask]) -> list[list[float] | None]:
        """See `Simulator`: the expected digit for each piece, from 0 to 9."""
        found: list[list[float] | None] = []
        for explanation, group in itertools.groupby(tasks, key=lambda task: task.explanation):
            prefix = SIMULATE_PROMPT.format(explanation=explanation)
            texts = [task.pieces for task in group]
            requests = [self._request("simulate", prefix, pieces=list(text)) for text in texts]
            found += self._cached(requests, lambda rows, p=prefix, t=texts: self._expected_digits(
                p, [t[row] for row in rows]))  # fmt: skip
        return found

    def judge(self, tasks: Sequence[JudgeTask]) -> list[list[float] | None]:
        """See `Judge`: P(yes) / (P(yes) + P(no))."""
        found: list[list[float] | None] = []
        for task in tasks:
            question = (FUZZ_PROMPT if task.marked else DETECT_PROMPT).format(
                explanation=task.explanation
            )
            request = self._request("judge", question, texts=list(task.texts))
            found += self._cached([request], lambda _, q=question, t=task: [self._yes_shares(
                q, t.texts)])  # fmt: skip
        return found

    def _request(self, kind: str, prompt: str, **more: Any) -> dict[str, Any]:
        return {"model": self._name, "kind": kind, "prompt": prompt, **more}

    def _cached(self, requests: list[dict[str, Any]], compute: Any) -> list[list[float] | None]:
        """Answers from the log; `compute` gives those of the missing rows."""
        found = [self._log.find(request) for request in requests]
        missing = [row for row, answer in enumerate(found) if answer is None]
        if missing:
            for row, answer in zip(missing, compute(missing), strict=True):
                found[row] = [round(value, 4) for value in answer]
                self._log.add(requests[row], found[row])
        return found

    @torch.no_grad()
    def _generate(self, prompt: str) -> str:
        request = self._request("explain", prompt)
        found = self._log.find(request)
        if found is None:
            ids = torch.tensor([self._ids(prompt)], device=self._model.device)
            made = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=self._tokenizer.eos_token_id,
            )
            text = self._tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            found = text.strip().split("\n")[0]
            self._log.add(request, found)
        return found

    def _expected_digits(self, prefix: str, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        tab, end = self._ids("\t"), self._ids(_UNKNOWN + "\n")
        rows: list[list[int]] = []
        places: list[list[int]] = []
        for pieces in texts:
            row: list[int] = []
            place: list[int] = []
            for piece in pieces:
                row += self._ids(piece.replace("\n", "\\n").replace("\t", " ")) + tab
                place.append(len(row) - 1)
                row += end
            rows.append(row)
            places.append(place)
        logits = self._logits(self._ids(prefix), rows, self._digits)
        expected = logits.softmax(-1) @ torch.arange(10.0)
        return [expected[row][place].tolist() for row, place in enumerate(places)]

    def _yes_shares(self, question: str, texts: Sequence[str]) -> list[float]:
        rows = [self._ids(f"Text: {text}\nAnswer:") for text in texts]
        logits = self._logits(self._ids(question), rows, [self._yes, self._no])
        last = torch.stack([logits[i, len(row) - 1] for i, row in enumerate(rows)])
        return last.softmax(-1)[:, 0].tolist()

    @torch.no_grad()
    def _logits(
        self, prefix: list[int], rows: list[list[int]], tokens: list[int]
    ) -> Float[Tensor, "row position token"]:
        """Logits of `tokens` at each position of the rows, which continue one prefix.

        The prefix runs once; its keys and values are repeated for the rows.
        """
        device = self._model.device
        begun = self._model(torch.tensor([prefix], device=device), use_cache=True)
        cache = begun.past_key_values
        cache.batch_repeat_interleave(len(rows))
        ids, mask = _padded(rows, len(prefix))
        output = self._model(
            ids.to(device), attention_mask=mask.to(device), past_key_values=cache, use_cache=True
        )
        return output.logits[..., tokens].float().cpu()

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def local_roles(settings: BackendSettings, log: CallLog) -> Roles:
    """The roles played by a model on this machine.

    Raises:
        ImportError: SmolLM2 is asked for and not installed.
        ValueError: the device is not there.
        OSError: the model cannot be had.
    """
    require_device(settings.llm_device)
    dtype = getattr(torch, settings.llm_dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"llm_dtype is {settings.llm_dtype!r}; give float32 or bfloat16")
    if settings.llm_name == SMOLLM2:
        model, tokenizer = read_gguf(smollm2_file(), dtype)
    else:
        model = load_model(settings.llm_name, "AutoModelForCausalLM", "cpu", settings.llm_dtype)
        tokenizer = model.tokenizer
    name = f"{settings.llm_name} in {settings.llm_dtype}"
    local = LocalModel(name, model.to(settings.llm_device), tokenizer, log)
    about = {"kind": "local", "name": settings.llm_name, "dtype": settings.llm_dtype}
    return Roles(local, local, local, about)


def explain_prompt(windows: Sequence[TextWindow]) -> str:
    """A few texts with marks, after two solved examples."""
    largest = max(max(window.activations) for window in windows) or 1.0
    texts = [
        marked_text(w, [a >= MARKED_SHARE * largest for a in w.activations]).replace("\n", " ")
        for w in windows[:_MOST_EXAMPLES]
    ]
    return EXPLAIN_PROMPT.format(texts=" | ".join(" ".join(text.split()) for text in texts))


def _padded(
    rows: list[list[int]], prefix: int
) -> tuple[Int[Tensor, "row position"], Int[Tensor, "row total"]]:
    """Rows padded on the right, and the mask over prefix and row."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * (prefix + len(row)) + [0] * (width - len(row)) for row in rows])
    return ids, mask
