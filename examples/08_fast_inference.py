"""Run a trained SAE at the cost of its active latents, alone and inside a model.

Run 01_train.py first. Writes ./output/08_fast_inference.json.
"""

import json
import time
from pathlib import Path

import torch
from sae_lens import SAE

from jumprelu_plugin import load_model, sparse_inference

sae = SAE.load_from_disk("output/01_train")
fast = sparse_inference(sae)  # the same SAE: a script needs no other change
model = load_model("tiny-gemma-2", "HookedSAETransformer")
tokens = model.to_tokens("The government of the country is")
x = torch.randn(2048, sae.cfg.d_in)


def milliseconds(run) -> float:
    took = []
    for _ in range(5):
        started = time.perf_counter()
        run()
        took.append(1e3 * (time.perf_counter() - started))
    return sorted(took)[2]


with torch.no_grad():  # with gradients it computes as the stock SAE does
    # 1. Alone: the same latents, the same reconstruction.
    assert torch.equal(fast.encode(x) != 0, sae.encode(x) != 0)
    difference = float((fast(x) - sae(x)).abs().max())

    # 2. Spliced into a model.
    stock_logits = model.run_with_saes(tokens, saes=[sae])
    fast_logits = model.run_with_saes(tokens, saes=[fast])
    moved = float((fast_logits - stock_logits).abs().max())

    # 3. Faster the wider the dictionary: this one is small.
    stock_ms, fast_ms = milliseconds(lambda: sae(x)), milliseconds(lambda: fast(x))

print(f"reconstructions differ by {difference:.0e}, spliced logits by {moved:.0e}")
print(f"stock {stock_ms:.1f} ms, sparse {fast_ms:.1f} ms for {len(x)} tokens")
record = {"difference": difference, "logits_moved": moved, "ms": [stock_ms, fast_ms]}
Path("output/08_fast_inference.json").write_text(json.dumps(record, indent=2))
