"""How the model that a dictionary was trained on is loaded, where a target's files cannot say it.

SAELens records `model_from_pretrained_kwargs`. Other tools load the model in their own way, and a
dictionary of a processed model would read activations that it was not trained on.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.models.firing import hook_flag
from jumprelu_plugin.models.loading_keywords import PROCESSING
from jumprelu_plugin.models.options import recorded_keywords
from jumprelu_plugin.transcoders.clt import CrossLayerTranscoder

# Where a block's parts begin and end. Of the processing, only `center_writing_weights` changes the
# activations here; the rest changes those within attention and MLPs, and the logits.
_BORDERS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "ln1.hook_normalized",
    "ln2.hook_normalized",
)
# Keyword arguments of transformers' and of TransformerLens' loaders that choose among the weights
# which one name holds.
_WHICH_WEIGHTS = ("revision", "subfolder", "checkpoint_index", "checkpoint_value")


def refuse_processing(
    exported: Dictionary | Mapping[int, Dictionary] | CrossLayerTranscoder,
    target: str,
    own: Iterable[str] = (),
) -> None:
    """Refuse a dictionary whose activations the target's tool would not compute.

    Args:
        exported: one dictionary, one for each layer, or a cross-layer transcoder.
        target: the target's name.
        own: keyword arguments that its tool sets by itself.

    Raises:
        ValueError: one was trained with keyword arguments that change its activations, and that are
            not among `own`.
    """
    for metadata, hooks in _parts(exported):
        keywords = recorded_keywords(metadata)
        for hook in hooks:
            names = [name for name in _changing(hook) if keywords.get(name) and name not in own]
            if names:
                given = json.dumps({name: keywords[name] for name in names})
                raise ValueError(
                    f"the dictionary was trained on a model that was loaded with {given}, which "
                    f"changes the activations at {hook}. Only --to saelens can say so, for one SAE "
                    f"or transcoder at a time: with --to {target}, the tool would give it other "
                    "activations. Export to saelens, or train a dictionary without it"
                )


def warn_of_other_weights(
    exported: Dictionary | Mapping[int, Dictionary] | CrossLayerTranscoder, target: str
) -> None:
    """Warn of weights that a model's name alone does not choose, such as a revision's.

    Args:
        exported: one dictionary, one for each layer, or a cross-layer transcoder.
        target: the target's name.
    """
    for metadata, _ in _parts(exported):
        given = which_weights(metadata)
        if given:
            warnings.warn(
                f"the dictionary was trained on a model that was loaded with {json.dumps(given)}, "
                f"and files for {target} name the model alone: load the same weights where its "
                "tool loads the model",
                stacklevel=3,
            )
            return


def which_weights(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded keyword arguments that choose among the weights which one name holds."""
    keywords = recorded_keywords(metadata)
    return {name: keywords[name] for name in _WHICH_WEIGHTS if keywords.get(name) is not None}


def _parts(exported: Any) -> Iterator[tuple[Mapping[str, Any], list[str]]]:
    """The metadata and the hooks of each dictionary."""
    if isinstance(exported, CrossLayerTranscoder):
        cfg = exported.cfg
        yield cfg.metadata, [hook for pair in cfg.pairs for hook in (pair.hook_in, pair.hook_out)]
        return
    for each in [exported] if isinstance(exported, Dictionary) else exported.values():
        yield each.metadata, [hook for hook in (each.hook_name, each.hook_name_out) if hook]


def _changing(hook: str) -> list[str]:
    """The keyword arguments that change the activations at a hook, or turn it on."""
    if hook.endswith(_BORDERS):
        return ["center_writing_weights"]
    flag = hook_flag(hook)
    processing = [name for name in PROCESSING if name != "center_unembed"]
    return processing if flag is None else [*processing, flag]
