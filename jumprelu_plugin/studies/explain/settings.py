"""The settings of an automated study; imports nothing heavy, for the command line's help."""

from __future__ import annotations

from dataclasses import dataclass

SMOLLM2 = "smollm2-135m"
SEEDS = range(2**32)  # numpy takes none below 0


@dataclass(frozen=True)
class ExplainSettings:
    """Which latents are explained, from what, and how explanations are scored.

    Attributes:
        latents: latents drawn from each SAE.
        contexts: contexts that the explainer sees, half top activations and half firings at even
            quantiles.
        scored_contexts: held-out contexts on which activations are simulated: top activations,
            firings at even quantiles and silence, a third each.
        sequences: sequences of text; the explainer's contexts come from every other one, the
            scored contexts from the rest.
        strata: strata of latent density that are sampled equally.
        nulls: whether to simulate from a random token and from another latent's explanation too.
        judge: whether to score detection and fuzzing too.
        seed: of all draws.
    """

    latents: int = 100
    contexts: int = 10
    scored_contexts: int = 9
    sequences: int = 512
    strata: int = 4
    nulls: bool = True
    judge: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.contexts < 2 or self.scored_contexts < 3 or self.sequences < 2:
            raise ValueError(
                f"contexts is {self.contexts}, scored_contexts {self.scored_contexts} and "
                f"sequences {self.sequences}; give at least 2, 3 and 2"
            )
        if self.latents < 1 or self.strata < 1:
            raise ValueError(
                f"latents is {self.latents} and strata {self.strata}; give at least 1 and 1"
            )
        if self.seed not in SEEDS:
            raise ValueError(f"seed is {self.seed}; give a number from 0 to {SEEDS[-1]}")


@dataclass(frozen=True)
class BackendSettings:
    """The language model that explains, simulates and judges.

    Attributes:
        llm_name: with base_url the endpoint's name of a model; else smollm2-135m, a model folder or
            a hub name, which runs on this machine.
        base_url: an OpenAI-compatible endpoint, such as http://localhost:8000/v1. Its key is read
            from the environment variable OPENAI_API_KEY alone.
        llm_dtype: of a local model's weights. bfloat16 is the fastest on recent CPUs.
        llm_device: of a local model.
        concurrency: requests to an endpoint at a time.
        retries: repetitions of a request that fails, after growing pauses or as the endpoint says.
        timeout_s: seconds until a request counts as failed.
        token_budget: tokens that requests and replies may take together in one run; no request is
            sent that could exceed it.
        price_in: dollars per million tokens of requests, for the estimate.
        price_out: dollars per million tokens of replies, for the estimate.
    """

    llm_name: str = SMOLLM2
    base_url: str | None = None
    llm_dtype: str = "bfloat16"
    llm_device: str = "cpu"
    concurrency: int = 8
    retries: int = 5
    timeout_s: float = 120.0
    token_budget: int = 5_000_000
    price_in: float | None = None
    price_out: float | None = None
