"""Splice an SAE into a model and steer with a latent: HookedSAETransformer and the bridge.

Run 01_train.py first. Writes ./output/03_steering.json.
"""

import json
from pathlib import Path

import torch
from sae_lens import SAE

from jumprelu_plugin import Ablate, Add, Clamp, load_model, steer

PROMPT = "The government of the country"

sae = SAE.load_from_disk("output/01_train")
model = load_model("tiny-gemma-2", "HookedSAETransformer")
tokens = model.to_tokens(PROMPT)
plain = model(tokens)

# 1. Splice. SAELens does this itself, with a folder this package wrote as with any other.
spliced = model.run_with_saes(tokens, saes=[sae])
print(f"spliced in, the logits move by {(spliced - plain).abs().mean():.3f} on average")
# With the error term the model is unchanged, and every latent is there to be read or edited.
with_error = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
print(f"with the error term by {(with_error - plain).abs().max():.0e} at most")

# 2. Which latents are active on the last token?
_, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
acts = cache[f"{sae.cfg.metadata.hook_name}.hook_sae_acts_post"][0, -1]
strongest = acts.topk(3)
latent, value = int(strongest.indices[0]), float(strongest.values[0])
print(f"strongest latents {strongest.indices.tolist()} at {strongest.values.tolist()}")

# 3. Steer. The block changes every forward pass inside it, `generate` included. After it, also
# after an exception, the model is exactly what it was.
changes = {
    "add": Add(latent, 3 * value),
    "clamp": Clamp(latent, 0.5 * value, positions="last"),  # the last position of each pass
    "ablate": Ablate(latent, batch=0),  # the first row of the batch
}
texts = {}
for name, change in {"without": None, **changes}.items():
    torch.manual_seed(0)
    if change is None:
        texts[name] = model.generate(PROMPT, max_new_tokens=20, top_k=20, verbose=False)
        continue
    with steer(model, sae, change):
        texts[name] = model.generate(PROMPT, max_new_tokens=20, top_k=20, verbose=False)
for name, text in texts.items():
    print(f"{name:>8}: {text!r}")
assert torch.equal(model(tokens), plain)

# 4. The same on a bridge, which wraps the transformers model.
bridge = load_model("tiny-gemma-2", "SAETransformerBridge")
with steer(model, sae, changes["add"]):
    expected = model(tokens)
with steer(bridge, sae, changes["add"]):
    found = bridge(tokens)
print(f"the steered bridge differs by {(found - expected).abs().max():.0e} at most")

record = {"latent": latent, "value": value, "texts": texts}
Path("output/03_steering.json").write_text(json.dumps(record, indent=2))
