"""Train a cross-layer transcoder on the embedded Gemma 2, replace all MLPs by it, trace a prompt.

Writes ./output/16_clt. The same training from the terminal: jumprelu train-clt
--output_path <folder>. Attribution needs circuit-tracer, which tools/circuit_env.sh installs.
"""

import os

import torch
from rich.console import Console

from jumprelu_plugin import (
    EMBEDDED_MODEL,
    CLTSettings,
    circuits,
    evaluate_clt,
    export,
    load_clt,
    load_model,
    tokenized_dataset,
    train_clt,
)

OUTPUT = "output/16_clt"
# Enough to see it work. Train for 300 steps or more to use the result.
STEPS = int(os.environ.get("JUMPRELU_EXAMPLE_STEPS", 80))
BATCH = 512  # tokens a step
console = Console()

model = load_model(EMBEDDED_MODEL)
settings = CLTSettings(
    hook_name="blocks.{layer}.ln2.hook_normalized",  # {layer} is each in turn
    hook_name_out="blocks.{layer}.hook_mlp_out",
    d_sae=512,  # latents of each layer
    target_l0=24,  # active latents a token, at each layer
    training_tokens=STEPS * BATCH,
    train_batch_size_tokens=BATCH,
    n_batches_in_buffer=64,  # sequences whose activations are shuffled together
    n_batches_for_norm_estimate=5,  # batches that the scales are measured on
    evaluation_sequences=0,  # done by hand below
)
train_clt(f"{OUTPUT}/trained", settings, model=model, log=console.print)

# The FVU of each output, and the loss with all MLPs replaced at once.
transcoder = load_clt(f"{OUTPUT}/trained")
held_out = torch.tensor(tokenized_dataset(model.tokenizer, 128, "test")[:16]["tokens"])
console.print(evaluate_clt(model, transcoder, held_out).table())

# Where the latents of each layer write: shares of their decoders' squared norms.
for layer, source in enumerate(transcoder.sources):
    parts = source.W_dec.detach().unflatten(1, (source.later, source.d_out)).square().sum((0, 2))
    shares = ", ".join(f"{share:.0%}" for share in (parts / parts.sum()).tolist())
    print(f"layer {layer} writes to layers {layer} to {transcoder.cfg.layers[-1]}: {shares}")

# A circuit through it, with circuit-tracer.
try:
    print(export(f"{OUTPUT}/trained", "circuit-tracer", f"{OUTPUT}/circuit_tracer"))
except ImportError as missing:
    export(f"{OUTPUT}/trained", "circuit-tracer", f"{OUTPUT}/circuit_tracer", unchecked=True)
    print(f"exported without the check: {missing}")
else:
    replacement = circuits.load_replacement_model(f"{OUTPUT}/circuit_tracer", EMBEDDED_MODEL)
    graph = circuits.attribute(replacement, "The capital of France is")
    error = circuits.row_sums(replacement, graph).relative_error
    print(
        f"{len(graph.active_features)} active features; rows sum to their nodes within {error:.1e}"
    )
