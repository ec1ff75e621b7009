"""The language model and the text to use: options, else what a dictionary's metadata names.

SAELens records the model of a dictionary in its metadata: `model_name`,
`model_class_name`, `model_from_pretrained_kwargs`, `dataset_path`, `context_size`, `prepend_bos`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from jumprelu_plugin.models.loading_keywords import HOOK_FLAGS, PROCESSING

_DTYPE = ("dtype", "torch_dtype")
# Never taken from metadata: the first runs a model's own code, the second may unpickle its weights.
_UNSAFE = ("trust_remote_code", "weights_only")


class NamedModel(Protocol):
    """Settings that name a language model and how it is loaded."""

    @property
    def model_name(self) -> str: ...
    @property
    def model_class_name(self) -> str: ...
    @property
    def model_from_pretrained_kwargs(self) -> Mapping[str, Any] | None: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class ModelOptions:
    """Options for a language model, its text, and where it runs.

    Attributes:
        model_name: tiny-gemma-2, a model folder, or a hub name. Default: the dictionary's own.
        model_class_name: HookedTransformer, HookedSAETransformer, TransformerBridge,
            SAETransformerBridge or AutoModelForCausalLM. Default: the dictionary's own, else
            HookedSAETransformer.
        dataset_path: a text or pretokenized dataset, on the hub or in a folder. Default: the
            dictionary's own, else the text of the `demo` extra.
        device: cpu, cuda, cuda:1, mps.
        dtype: of the language model's weights. Default: as recorded, else float32.
        hook_name: the hook that the dictionary reads. Default: the dictionary's own.
        hook_name_out: the hook that a transcoder writes. Default: the dictionary's own.
        model_from_pretrained_kwargs: keyword arguments of the model's loader, as JSON. Default: as
            recorded; for another model or class, the recorded processing of weights alone.
    """

    model_name: str | None = None
    model_class_name: str | None = None
    dataset_path: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    hook_name: str | None = None
    hook_name_out: str | None = None
    model_from_pretrained_kwargs: dict[str, Any] | None = None

    def resolve(self, metadata: Mapping[str, Any], source: object) -> ModelChoice:
        """Fill in missing options from a dictionary's metadata.

        Args:
            metadata: the dictionary's metadata, with SAELens' names.
            source: the dictionary's folder, for error messages.

        Raises:
            ValueError: neither the user nor the metadata names a model, or the recorded keyword
                arguments are none.
        """
        name = self.model_name or metadata.get("model_name")
        if not name:
            raise ValueError(
                f"the dictionary in {source} does not name its model; name it with --model_name"
            )
        keywords, dtype = self._keywords(metadata)
        dataset = self.dataset_path
        return ModelChoice(
            model_name=name,
            model_class_name=_class_name(self.model_class_name, metadata),
            dataset_path=metadata.get("dataset_path") or "" if dataset is None else dataset,
            context_size=metadata.get("context_size"),
            prepend_bos=metadata.get("prepend_bos") is not False,
            sequence_separator_token=metadata.get("sequence_separator_token", "bos"),
            disable_concat_sequences=metadata.get("disable_concat_sequences") is True,
            device=self.device,
            dtype=dtype,
            from_pretrained_kwargs=keywords,
            differences=self._differences(metadata, dtype),
        )

    def _keywords(self, metadata: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """The loader's keyword arguments without a dtype, and the dtype."""
        keywords = self.model_from_pretrained_kwargs
        if keywords is None:
            other_model = bool(self.model_name or self.model_class_name)
            keywords = recorded_keywords(metadata, other_model=other_model)
        keywords = dict(keywords)
        dtypes = [keywords.pop(key) for key in _DTYPE if key in keywords]
        return keywords, _dtype_name(self.dtype or next(iter(dtypes), None))

    def _without_dtype(self) -> dict[str, Any] | None:
        given = self.model_from_pretrained_kwargs
        return given and {key: value for key, value in given.items() if key not in _DTYPE}

    def _differences(self, metadata: Mapping[str, Any], dtype: str) -> tuple[str, ...]:
        recorded = recorded_keywords(metadata)
        dtypes = [recorded.pop(key) for key in _DTYPE if key in recorded]
        pairs: list[tuple[str, Any, Any]] = [
            ("model_name", self.model_name, metadata.get("model_name")),
            (
                "model_class_name",
                self.model_class_name and _class_name(self.model_class_name, {}),
                metadata.get("model_class_name") and _class_name(None, metadata),
            ),
            ("hook_name", self.hook_name, metadata.get("hook_name")),
            ("hook_name_out", self.hook_name_out, metadata.get("hook_name_out")),
        ]
        if "model_from_pretrained_kwargs" in metadata:
            pairs += [
                ("dtype", dtype, _dtype_name(next(iter(dtypes), None))),
                ("model_from_pretrained_kwargs", self._without_dtype(), recorded),
            ]
        return tuple(
            f"{name} {given} in place of the recorded {value}"
            for name, given, value in pairs
            if given is not None and value is not None and given != value
        )


@dataclass(frozen=True)
class ModelChoice:
    """`ModelOptions` in which every option has a value.

    Attributes:
        context_size: tokens in a sequence; None where nothing records it.
        prepend_bos: whether sequences begin with the tokenizer's BOS token.
        sequence_separator_token: what SAELens puts between two documents.
        disable_concat_sequences: whether documents stay apart, and short ones are left out.
        from_pretrained_kwargs: keyword arguments for `load_model`.
        differences: in what the choice differs from the metadata, one phrase each.
    """

    model_name: str
    model_class_name: str
    dataset_path: str
    context_size: int | None
    prepend_bos: bool
    device: str
    dtype: str
    from_pretrained_kwargs: Mapping[str, Any] = field(default_factory=dict)
    sequence_separator_token: int | str | None = "bos"
    disable_concat_sequences: bool = False
    differences: tuple[str, ...] = ()

    def load(self) -> Any:
        """Load the model, with hooks; raises the errors of `language_models.load_model`."""
        from jumprelu_plugin.models.hooked_auto_model import load_hooked_model

        return load_hooked_model(
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


def recorded_keywords(metadata: Mapping[str, Any], *, other_model: bool = False) -> dict[str, Any]:
    """The metadata's `model_from_pretrained_kwargs`, without those that could run a model's code.

    Args:
        metadata: a dictionary's metadata.
        other_model: whether they are for another model or class than the recorded. Then a revision,
            say, is left out. How weights are processed is kept: it is what the dictionary was
            trained on, whichever copy of the model is given.

    Raises:
        ValueError: they are no names and values.
    """
    found = metadata.get("model_from_pretrained_kwargs") or {}
    if not isinstance(found, Mapping):
        raise ValueError(
            f"the metadata's model_from_pretrained_kwargs are {found!r}; expected names and values"
        )
    # A dictionary's files do not decide whether code that they name is run.
    kept = {key: value for key, value in found.items() if key not in _UNSAFE}
    if not other_model:
        return kept
    of_activations = (*PROCESSING, *HOOK_FLAGS, *_DTYPE)
    return {key: value for key, value in kept.items() if key in of_activations}


def named_model(settings: NamedModel) -> Any:
    """The model, with hooks, that a command's settings name.

    Raises:
        ValueError, OSError: as `language_models.load_model`; or two dtypes contradict each other.
    """
    from jumprelu_plugin.models.hooked_auto_model import load_hooked_model

    keywords = keywords_to_record(settings)
    dtype = _dtype_name(keywords.pop("dtype", None))
    return load_hooked_model(
        settings.model_name, settings.model_class_name, settings.device, dtype, **keywords
    )


def keywords_to_record(settings: NamedModel) -> dict[str, Any]:
    """`model_from_pretrained_kwargs` for the metadata of what is trained, so that every command
    loads the model that it was trained on: the settings' own, with a dtype that is not float32.

    Raises:
        ValueError: two dtypes contradict each other.
    """
    keywords = dict(settings.model_from_pretrained_kwargs or {})
    dtypes = {_dtype_name(keywords.pop(key)) for key in _DTYPE if key in keywords}
    if settings.dtype != "float32":
        dtypes.add(_dtype_name(settings.dtype))
    if len(dtypes) > 1:
        raise ValueError(
            f"dtype is {' and '.join(sorted(dtypes))}, in --dtype and in "
            "model_from_pretrained_kwargs: give one"
        )
    other = [{"dtype": dtype} for dtype in dtypes if dtype != "float32"]
    return {**keywords, **(other[0] if other else {})}


def _dtype_name(dtype: Any) -> str:
    return str(dtype or "float32").removeprefix("torch.")
