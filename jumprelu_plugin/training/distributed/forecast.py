"""What a step on many GPUs exchanges and takes, from its sizes and published figures alone.

The bytes that processes exchange are those of docs/guides/many-gpus.md, which tests count. The
times are arithmetic, at the rates of a GPU's data sheet: products, passes over its memory without
reuse in caches, and what travels, each by itself. The largest of the three bounds the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from jumprelu_plugin.training.distributed.division import (
    dictionary_parameters,
    handed_over,
    share_of_pass,
)
from jumprelu_plugin.training.distributed.hardware import Hardware
from jumprelu_plugin.training.health.memory import size

FLOAT32, BFLOAT16, INT64 = 4, 2, 8
# Rows of d numbers that are read for a pair of a token and a latent above the lower edge of the
# window: for its exact pre-activation and the encoder's gradient; and, where it is active, about a
# third of them, for the reconstruction, its gradient and the decoder's gradient.
ROWS_A_PAIR = 3
# Passes over each number of the dictionary: gradient written, its norm, clipped (2), Adam (reads 4,
# writes 3), and the encoder's copy in bfloat16 (2) for half of them.
PASSES = 12.0
# Over the decoder alone: tangential gradient (3) and unit rows (2).
DECODER_PASSES = 5.0


@dataclass(frozen=True)
class TrainingSizes:
    """What decides the cost of a step, for all processes together.

    Attributes:
        d_in, d_out, d_sae: of the dictionary.
        batch: tokens in a step.
        entries: pairs a token in the window or above it.
        prefixes: Matryoshka prefixes.
        limits_outliers: whether outlier tokens are limited.
        limits_density: whether the densities of latents are.
        reads_b_dec: whether the encoder subtracts b_dec.
        model_parameters: of the language model, through which a token goes before the hook.
        model_in_bfloat16: or in float32.
        transcodes: whether input and output are harvested, at two hooks.
        skips: whether there is a W_skip, which every process holds.
        prompts: sequences of a pass of the model; None: as many as divide evenly.
        activation_bytes: of a number that is harvested.
        prefetches: whether each process runs the model on all of the text, and hands nothing over.
    """

    d_in: int
    d_out: int
    d_sae: int
    batch: int
    entries: float
    prefixes: int = 0
    limits_outliers: bool = True
    limits_density: bool = True
    reads_b_dec: bool = False
    model_parameters: float = 0.0
    model_in_bfloat16: bool = True
    transcodes: bool = False
    skips: bool = False
    prompts: int | None = None
    activation_bytes: int = FLOAT32
    prefetches: bool = False

    def parameters(self, shards: int) -> int:
        """Numbers of the dictionary in one of so many shards."""
        return dictionary_parameters(self.d_in, self.d_out, self.d_sae // shards, skips=self.skips)

    def harvest(self, processes: int) -> int:
        """Bytes of activations that each of so many processes hands over for a step, on average."""
        if self.prefetches or processes == 1:
            return 0
        width = self.d_in + self.d_out * self.transcodes
        prompts = self.prompts or processes
        return handed_over(self.batch, prompts, processes, width, self.activation_bytes)

    def tokens_run(self, processes: int) -> float:
        """Tokens that each of so many processes runs the model on for a step, on average."""
        if self.prefetches:
            return self.batch
        prompts = self.prompts or processes
        return self.batch * share_of_pass(prompts, processes) / prompts


@dataclass(frozen=True)
class Traffic:
    """Bytes that each process hands over in a step.

    Attributes:
        latents: to the processes of its replica.
        tokens: to those that hold the same latents.
        all: scalars, to every process.
        harvest: activations, to every process.
    """

    latents: int
    tokens: int
    all: int
    harvest: int

    @property
    def total(self) -> int:
        return self.latents + self.tokens + self.all + self.harvest

    def described(self) -> str:
        """In words, for the console."""
        parts = (
            ("gradients and counts", self.tokens),
            ("reconstructions", self.latents),
            ("activations", self.harvest),
        )
        named = ", ".join(f"{name} {size(part)}" for name, part in parts if part)
        return f"{size(self.total)} a step" + (f" ({named})" if named else "")


def traffic(sizes: TrainingSizes, replicas: int, shards: int) -> Traffic:
    """Bytes of one step; a group of one exchanges nothing."""
    tokens, latents = sizes.batch // replicas, sizes.d_sae // shards
    row = column = every = harvest = 0
    if shards > 1:
        row = FLOAT32 * (tokens * sizes.d_out * (1 + sizes.prefixes) + 2 + sizes.limits_density)
        row += FLOAT32 * sizes.d_out * sizes.reads_b_dec
    if replicas > 1:
        column = FLOAT32 * (sizes.parameters(shards) + latents + 2 + sizes.prefixes)
        column += FLOAT32 * tokens * sizes.limits_outliers
    if replicas * shards > 1:
        every = 4 * FLOAT32 + 2 * INT64
        harvest = sizes.harvest(replicas * shards)
    return Traffic(row, column, every, harvest)


@dataclass(frozen=True)
class StepTimes:
    """The seconds that each of three parts of a step takes at published rates.

    Attributes:
        compute: products on tensor cores, and the language model.
        memory: passes over the GPU's memory.
        exchange: what travels.
    """

    compute: float
    memory: float
    exchange: float

    @property
    def least(self) -> float:
        """Seconds of the largest part, if the others ran beside it."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def sum(self) -> float:
        """Seconds of the parts one after the other."""
        return self.compute + self.memory + self.exchange

    @property
    def bound(self) -> str:
        """What that is: compute, memory or traffic."""
        times = self._named()
        return max(times, key=lambda name: times[name])

    def described(self, gpu: Hardware) -> str:
        """In words, for the console.

        Args:
            gpu: whose times they are.
        """
        named = ", ".join(f"{name} {1e3 * took:.2g} ms" for name, took in self._named().items())
        return f"{self.bound} on {gpu.name}, by the rates of its data sheet: {named}"

    def _named(self) -> dict[str, float]:
        return {"compute": self.compute, "memory": self.memory, "traffic": self.exchange}


def step_times(sizes: TrainingSizes, replicas: int, shards: int, gpu: Hardware) -> StepTimes:
    """The times of a step on a mesh of one kind of GPU.

    The step is the screened one: one product in bfloat16, then rows of both matrices at the pairs
    that are left, in float32, as are the products with W_skip.
    """
    tokens, latents = sizes.batch / replicas, sizes.d_sae / shards
    product = 2 * tokens * sizes.d_in * latents / gpu.bfloat16
    rate = gpu.bfloat16 if sizes.model_in_bfloat16 else gpu.float32
    model = 2 * sizes.model_parameters * sizes.tokens_run(replicas * shards) / rate
    # The output, and the gradient of W_skip, in every shard.
    skip = sizes.skips * 4 * tokens * sizes.d_in * sizes.d_out / gpu.float32
    width = 0.5 * (sizes.d_in + sizes.d_out)
    pairs = ROWS_A_PAIR * FLOAT32 * width * tokens * sizes.entries / shards
    passes = FLOAT32 * PASSES * sizes.parameters(shards)
    passes += FLOAT32 * DECODER_PASSES * latents * sizes.d_out
    return StepTimes(
        compute=product + model + skip,
        memory=(pairs + passes) / gpu.memory_bandwidth,
        exchange=exchange_seconds(traffic(sizes, replicas, shards), replicas, shards, gpu),
    )


def exchange_seconds(sent: Traffic, replicas: int, shards: int, gpu: Hardware) -> float:
    """Seconds that a step's traffic takes on a mesh of one kind of GPU.

    Rings: a sum carries 2(N - 1)/N of what each hands over, a gathering N - 1 times.
    """
    size = replicas * shards
    everywhere = gpu.link if size <= gpu.gpus else gpu.network
    in_a_row = gpu.link if shards <= gpu.gpus else gpu.network
    return (
        2 * (shards - 1) / shards * sent.latents / in_a_row
        + 2 * (replicas - 1) / replicas * sent.tokens / everywhere
        + (size - 1) * sent.harvest / everywhere
    )
