"""The grid of a sweep: what is varied, what is the same for all, and which cells it has."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from jumprelu_plugin.models.language_models import EMBEDDED_MODEL
from jumprelu_plugin.studies.sweep import values
from jumprelu_plugin.studies.sweep.architectures import ARCHITECTURES, PLUGIN
from jumprelu_plugin.training.activations.cache.coding import DTYPES
from jumprelu_plugin.training.activations.cache.manifest import CacheManifest

# TransformerLens' names of the paper's three sites; on Gemma 2, hook_mlp_out is after the norm.
SITES = {
    "residual": "blocks.{layer}.hook_resid_post",
    "mlp": "blocks.{layer}.hook_mlp_out",
    "attention": "blocks.{layer}.attn.hook_z",
}
DEFAULT_LR = 3e-3
# One field or another says where the SAEs sit.
_VARIED = ("architectures", "l0", "seeds", "sites", "layers", "hook_names")
_AT_LEAST_ONE = (
    "training_tokens",
    "train_batch_size_tokens",
    "cached_tokens",
    "context_size",
    "held_out",
    "train_together",
)
# How each field is read; a field whose default is None may also be None.
_READERS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("architectures", "sites", "hook_names"), values.texts),
    **dict.fromkeys(("seeds", "layers"), values.whole_numbers),
    **dict.fromkeys((*_AT_LEAST_ONE, "d_sae"), values.whole_number),
    **dict.fromkeys(
        (
            "model_name",
            "model_class_name",
            "dataset_path",
            "device",
            "dtype",
            "cache_dtype",
            "activations",
        ),
        values.text,
    ),
    "l0": values.numbers,
    "lr": values.rates,
    "model_from_pretrained_kwargs": values.names_and_values,
}
# The values of fields that neither the user nor an activation cache gives.
_DEFAULTS = {
    "model_name": EMBEDDED_MODEL,
    "model_class_name": "HookedSAETransformer",
    "dataset_path": "",
    "context_size": 128,
    "cache_dtype": "float32",
}
# The default of these fields. Settings that are made hold the cache's value or that of `_DEFAULTS`.
_OF_THE_CACHE: Any = None
# These may change between two calls for one folder.
_OF_A_CALL = ("lr", "activations", "device", "cache_dtype", "train_together")


@dataclass(frozen=True)
class Cell:
    """One SAE of a sweep.

    Attributes:
        hook: where its activations come from.
        architecture: a name of `ARCHITECTURES`.
        target_l0: the L0 it is trained to.
        seed: of initialization and data order.
        lr: learning rate; None: by the size of the run (`control.learning_rate`).
    """

    hook: str
    architecture: str
    target_l0: float
    seed: int
    lr: float | None

    @property
    def name(self) -> str:
        """Its folder in the sweep's."""
        lr = "by_rule" if self.lr is None else f"{self.lr:g}"
        varied = f"l0_{self.target_l0:g}_seed_{self.seed}_lr_{lr}"
        return f"{self.hook}/{self.architecture}/{varied}"


@dataclass(frozen=True)
class SweepSettings:
    """A grid of SAEs and how they are trained. A YAML file has these fields as keys.

    Attributes:
        architectures: names; `studies/sweep/architectures.py` lists them.
        l0: target L0s.
        seeds: of initialization and data order.
        sites: residual, mlp, attention: the residual stream, the MLP output, the attention output
            before W_O. Default: residual, or none where there are hook_names.
        layers: layers at whose sites SAEs are trained.
        hook_names: hooks by name, beside those of sites and layers.
        d_sae: number of latents.
        training_tokens: tokens that each SAE is trained on; a text with fewer is read repeatedly.
        train_batch_size_tokens: tokens in a step.
        lr: learning rate of all architectures, or a mapping of names to rates, in which "default"
            is that of the others. Where neither is given, `jumprelu-plugin` takes the rate that
            belongs to the width of the activations (`control.standardization`), and the others
            3e-3.
        model_name, model_class_name, model_from_pretrained_kwargs, dataset_path, device, dtype: as
            in `CacheSettings`. Default: tiny-gemma-2 as a HookedSAETransformer, and the text of the
            `demo` extra.
        cached_tokens: tokens of text whose activations are written. Default: training_tokens.
        context_size: tokens in a sequence. Default: 128.
        cache_dtype: of the stored activations: float32 (default), bfloat16 or int8.
        held_out: held-out sequences that every SAE is evaluated on.
        activations: folder of an activation cache to read instead of writing one. The defaults of
            model_name, model_class_name, dataset_path, context_size and cache_dtype are then the
            cache's.
        train_together: SAEs of this package at one hook that are trained at one time, at most.

    Raises:
        ValueError: a field has another type or a value that cannot be, `activations` is no
            activation cache, or the cache is of another model or text than the fields name.
    """

    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    l0: tuple[float, ...] = (20, 40, 80)
    seeds: tuple[int, ...] = (0,)
    sites: tuple[str, ...] | None = None
    layers: tuple[int, ...] = (2,)
    hook_names: tuple[str, ...] = ()
    d_sae: int = 2048
    training_tokens: int = 1_000_000
    train_batch_size_tokens: int = 1024
    lr: float | Mapping[str, float] | None = None
    model_name: str = _OF_THE_CACHE
    model_class_name: str = _OF_THE_CACHE
    model_from_pretrained_kwargs: Mapping[str, Any] | None = None
    dataset_path: str = _OF_THE_CACHE
    device: str = "cpu"
    dtype: str = "float32"
    cached_tokens: int | None = None
    context_size: int = _OF_THE_CACHE
    cache_dtype: str = _OF_THE_CACHE
    held_out: int = 128
    activations: str | None = None
    train_together: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if given is not None or field.default is not None:
                self._set(field.name, _READERS[field.name](field.name, given))
        if self.sites is None:
            self._set("sites", () if self.hook_names else ("residual",))
        for name in _VARIED:
            self._set(name, tuple(dict.fromkeys(getattr(self, name))))
        self._take_from_cache()
        if self.activations is not None and self.cached_tokens is not None:
            raise ValueError(
                f"cached_tokens is {self.cached_tokens:,}, and {self.activations} holds "
                "activations that are written already: leave one of them out"
            )
        _require_known("architecture", self.architectures, ARCHITECTURES)
        _require_known("site", self.sites or (), SITES)
        _require_known("cache_dtype", [self.cache_dtype], DTYPES)
        for name in ("architectures", "l0", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"the sweep has no {name}: give at least one")
        if not self.hooks:
            raise ValueError("the sweep has no hooks: give sites and layers, or hook_names")
        for value in self.l0:
            if not 0 < value < self.d_sae:
                raise ValueError(f"l0 has {value!r}; expected more than 0 and less than d_sae")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds has {min(self.seeds)}; expected 0 or more")
        if isinstance(self.lr, Mapping):
            _require_known("architecture in lr", self.lr, {**ARCHITECTURES, "default": None})
        rates = [self.lr_of(name) for name in self.architectures]
        if not all(rate is None or rate > 0 for rate in rates):
            raise ValueError(f"lr is {self.lr}; expected more than 0")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _take_from_cache(self) -> None:
        """Fill in the fields that a cache decides; refuse those that were given otherwise."""
        there = _DEFAULTS if self.activations is None else _of_cache(self.activations)
        different: list[str] = []
        for name, value in there.items():
            given = getattr(self, name)
            if given is None:
                self._set(name, value)
            # Whether another class is another model, the digest of its weights says.
            elif given != value and name != "model_class_name":
                different.append(f"{name} is {value!r} in the cache and {given!r} in the sweep")
        if different and self.activations is not None:
            raise ValueError(
                f"the activation cache {self.activations} is not of this sweep: "
                f"{'; '.join(different)}. Leave these out, to take the cache's values, or write "
                "another cache"
            )

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of all hooks."""
        at_sites = (
            SITES[site].replace("{layer}", str(layer))
            for site, layer in product(self.sites or (), self.layers)
        )
        return tuple(dict.fromkeys([*at_sites, *self.hook_names]))

    @property
    def steps(self) -> int:
        """Training steps of each SAE."""
        return max(1, self.training_tokens // self.train_batch_size_tokens)

    def lr_of(self, architecture: str) -> float | None:
        """The learning rate of an architecture; None: by the width of the activations."""
        given = self.lr
        if isinstance(given, Mapping):
            given = given.get(architecture, given.get("default"))
        if given is not None:
            return float(given)
        return None if architecture == PLUGIN else DEFAULT_LR

    def cells(self) -> list[Cell]:
        """All SAEs of the sweep, seed by seed, so that a whole grid is there early."""
        return [
            Cell(hook, architecture, float(l0), seed, self.lr_of(architecture))
            for seed, hook, l0, architecture in product(
                self.seeds, self.hooks, self.l0, self.architectures
            )
        ]

    def fixed(self) -> dict[str, Any]:
        """The fields that are the same for all SAEs of a sweep's folder."""
        fields = dataclasses.asdict(self)
        return {
            name: value for name, value in fields.items() if name not in (*_VARIED, *_OF_A_CALL)
        }


def read_grid(path: str | Path | None, changes: Mapping[str, Any]) -> SweepSettings:
    """Settings from a YAML file, in which `changes` replace what it says.

    Raises:
        ValueError: the file is no mapping, or has an unknown key or a value that cannot be.
        OSError: the file cannot be read.
    """
    fields: dict[str, Any] = {}
    if path is not None:
        try:
            read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(read, Mapping):
            raise ValueError(f"{path} holds no grid: give fields such as architectures and l0")
        fields.update(read)
    fields.update(changes)
    _require_known("field", fields, [field.name for field in dataclasses.fields(SweepSettings)])
    return SweepSettings(**fields)


def _of_cache(folder: str) -> dict[str, Any]:
    """The fields that an activation cache decides, as its manifest says."""
    manifest = CacheManifest.load(Path(folder))
    return {
        "model_name": manifest.model_name,
        "model_class_name": manifest.model_class_name,
        "dataset_path": manifest.dataset_path,
        "context_size": manifest.context_size,
        "cache_dtype": manifest.dtype,
    }


def _require_known(kind: str, given: Iterable[Any], known: Iterable[str]) -> None:
    names = list(known)
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise ValueError(
                f"unknown {kind} {name!r} in the sweep; {hint}Known: {', '.join(names)}"
            )
