"""Train one transcoder a layer on the embedded Gemma 2, then splice all of them in at once.

Writes ./output/07_transcoders: stock SAELens folders layer_0 to layer_5 and a record. The same
training from the terminal: jumprelu train-transcoders --output_path <folder>
"""

import os

import torch
from rich.console import Console
from sae_lens import SAE

from jumprelu_plugin import (
    EMBEDDED_MODEL,
    TranscoderSettings,
    evaluate_transcoders,
    load_model,
    tokenized_dataset,
    train_transcoders,
)

OUTPUT = "output/07_transcoders"
# Enough to see it work. Train for 1,000 steps or more to use the result.
STEPS = int(os.environ.get("JUMPRELU_EXAMPLE_STEPS", 80))
BATCH = 512  # tokens a step
console = Console()

model = load_model(EMBEDDED_MODEL)
settings = TranscoderSettings(
    hook_name="blocks.{layer}.ln2.hook_normalized",  # any pair of hooks; {layer} is each in turn
    hook_name_out="blocks.{layer}.hook_mlp_out",
    d_sae=512,
    target_l0=24,
    training_tokens=STEPS * BATCH,
    train_batch_size_tokens=BATCH,
    n_batches_in_buffer=128,  # sequences whose activations are shuffled together
    n_batches_for_norm_estimate=5,  # batches that the two scales are measured on
    evaluation_sequences=0,  # done by hand below
)
train_transcoders(OUTPUT, settings, model=model, log=console.print)

# Stock SAELens loads what was saved.
transcoders = [SAE.load_from_disk(f"{OUTPUT}/layer_{layer}") for layer in range(model.cfg.n_layers)]
held_out = torch.tensor(tokenized_dataset(model.tokenizer, 128, "test")[:16]["tokens"])
console.print(evaluate_transcoders(model, transcoders, held_out).table())

# One of them, for one word: which latents of layer 3 fire, and how strongly.
transcoder = transcoders[3]
_, cache = model.run_with_cache("The capital of the country")
latents = transcoder.encode(cache[transcoder.cfg.metadata.hook_name])[0, -1]
for latent in latents.topk(3).indices.tolist():
    print(f"latent {latent}: {latents[latent]:.2f}")
