"""Judge a saved SAE on held-out text: delta LM loss, FVU, L0, dead and dense latents.

Run 01_train.py first. Writes ./output/02_evaluate.json, a record with its provenance.
"""

import torch
from rich import print
from sae_lens import SAE

from jumprelu_plugin.evaluation import evaluate
from jumprelu_plugin.models.language_models import load_model, model_digest
from jumprelu_plugin.models.text import tokenized_dataset
from jumprelu_plugin.records import digest, provenance

SEQUENCES = 32  # 128 and more for numbers worth quoting

# Stock SAELens loads the folder; so would a program that has never heard of this package.
sae = SAE.load_from_disk("output/01_train")
model = load_model(sae.cfg.metadata.model_name)

# "test" is text that neither the embedded model nor the SAE was trained on.
text = tokenized_dataset(model.tokenizer, context_size=128, split="test")
tokens = torch.tensor(text[:SEQUENCES]["tokens"])

# The model runs as it is, with the reconstruction spliced in, and with the mean in its place.
result = evaluate(model, sae, tokens)
print(result.table())

record = provenance(model_digest=model_digest(model), data_digest=digest(tokens))
print(f"written: {result.save('output/02_evaluate.json', record)}")

# Every number is an attribute; firing_frequency has one for each latent.
densest = result.firing_frequency.topk(3)
print(f"densest latents {densest.indices.tolist()} fire on {densest.values.tolist()} of tokens")
