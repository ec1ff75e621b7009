"""Evaluate a saved SAE on held-out text: delta LM loss, FVU, L0, dead and dense latents.

Run 01_train.py first. Writes ./output/02_evaluate.json, a record with its provenance.
"""

import torch
from rich import print
from sae_lens import SAE

from jumprelu_plugin import evaluate, load_model, tokenized_dataset

SEQUENCES = 32  # read 128 or more for numbers to report

# Stock SAELens loads the folder; so would a program that has never heard of this package.
sae = SAE.load_from_disk("output/01_train")
model = load_model(sae.cfg.metadata.model_name)

# Neither the embedded model nor the SAE was trained on the "test" split.
text = tokenized_dataset(model.tokenizer, context_size=128, split="test")
tokens = torch.tensor(text[:SEQUENCES]["tokens"])

# Three forward passes: the model as it is, with the reconstruction, with the mean activation.
result = evaluate(model, sae, tokens)
print(result.table())

# The record says which versions, commit and hardware gave these numbers.
print(f"written: {result.save('output/02_evaluate.json')}")

# Every number is an attribute; firing_frequency has one entry a latent.
densest = result.firing_frequency.topk(3)
print(f"densest latents {densest.indices.tolist()} fire on {densest.values.tolist()} of tokens")
