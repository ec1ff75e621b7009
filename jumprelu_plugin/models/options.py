"""The language model and the text to use: options, else what a dictionary's metadata names.

SAELens records the model of a dictionary in its metadata: `model_name`,
`model_class_name`, `model_from_pretrained_kwargs`, `dataset_path`, `context_size`, `prepend_bos`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DEFAULT_CONTEXT_SIZE = 128


@dataclass(frozen=True)
class ModelOptions:
    """Options for a language model, its text, and where it runs.

    Attributes:
        model_name: tiny-gemma-2, a model folder, or a hub name. Default: the dictionary's own.
        model_class_name: HookedTransformer, HookedSAETransformer, TransformerBridge or
            SAETransformerBridge. Default: the dictionary's own, else HookedSAETransformer.
        dataset_path: a text or pretokenized dataset, on the hub or in a folder. Default: the
            dictionary's own, else the text of the `demo` extra.
        device: cpu, cuda, cuda:1, mps.
        dtype: of the language model's weights. Default: as recorded, else float32.
    """

    model_name: str | None = None
    model_class_name: str | None = None
    dataset_path: str | None = None
    device: str = "cpu"
    dtype: str | None = None

    def resolve(self, metadata: Mapping[str, Any], source: object) -> ModelChoice:
        """Fill in missing options from a dictionary's metadata.

        Args:
            metadata: the dictionary's metadata, with SAELens' names.
            source: the dictionary's folder, for error messages.

        Raises:
            ValueError: neither the user nor the metadata names a model.
        """
        name = self.model_name or metadata.get("model_name")
        if not name:
            raise ValueError(
                f"the dictionary in {source} does not name its model; name it with --model_name"
            )
        kwargs = dict(metadata.get("model_from_pretrained_kwargs") or {})
        if self.model_name or self.model_class_name:
            kwargs = {}  # recorded for another model or class
        recorded_dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
        dataset = self.dataset_path
        return ModelChoice(
            model_name=name,
            model_class_name=_class_name(self.model_class_name, metadata),
            dataset_path=metadata.get("dataset_path") or "" if dataset is None else dataset,
            context_size=metadata.get("context_size") or DEFAULT_CONTEXT_SIZE,
            prepend_bos=metadata.get("prepend_bos") is not False,
            device=self.device,
            dtype=str(self.dtype or recorded_dtype or "float32"),
            from_pretrained_kwargs=kwargs,
        )


@dataclass(frozen=True)
class ModelChoice:
    """`ModelOptions` in which every option has a value.

    Attributes:
        context_size: tokens in a sequence.
        prepend_bos: whether sequences begin with the tokenizer's BOS token.
        from_pretrained_kwargs: recorded keyword arguments for the loader of a hub model.
    """

    model_name: str
    model_class_name: str
    dataset_path: str
    context_size: int
    prepend_bos: bool
    device: str
    dtype: str
    from_pretrained_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """Load the model; raises the errors of `language_models.load_model`."""
        from jumprelu_plugin.models.language_models import load_model

        return load_model(
            self.model_name,
            self.model_class_name,
            self.device,
            self.dtype,
            **self.from_pretrained_kwargs,
        )


def _class_name(chosen: str | None, metadata: Mapping[str, Any]) -> str:
    recorded = metadata.get("model_class_name")
    # A HookedSAETransformer is a HookedTransformer into which an SAE can be spliced.
    if recorded == "HookedTransformer":
        recorded = None
    return chosen or recorded or "HookedSAETransformer"
