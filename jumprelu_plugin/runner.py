"""SAELens' language-model runner, for runs that are checked first and never lost.

`JumpReLUTrainingRunner` takes SAELens' own config and trains whatever architecture it names. On top
of `LanguageModelSAETrainingRunner` it
  - refuses a run that cannot work before anything is computed or written;
  - knows the embedded model and local model folders by `model_name`;
  - seeds PyTorch with `cfg.seed`, so that a run can be repeated;
  - shows and records metrics (`trainer.py`);
  - saves the SAE, not only the data position, when it is interrupted;
  - trains transcoders, reading both hooks in one forward pass (`pair_store.py`).
A script that keeps SAELens' own runner trains the same SAE.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override

from jumprelu_plugin.hook_pairs import pair_widths
from jumprelu_plugin.models import EMBEDDED_MODEL, load_model
from jumprelu_plugin.pair_scaler import PairScaler
from jumprelu_plugin.pair_store import HookPair, PairStore
from jumprelu_plugin.saes.transcoder import JumpReLUTrainingTranscoder
from jumprelu_plugin.saes.transcoder_config import JumpReLUTranscoderTrainingConfig
from jumprelu_plugin.text import tokenized_dataset
from jumprelu_plugin.trainer import JumpReLUTrainer
from jumprelu_plugin.transcoder_evaluator import TranscoderEvaluator

METRICS_FILENAME = "metrics.jsonl"


class JumpReLUTrainingRunner(LanguageModelSAETrainingRunner):
    """Train one SAE on a hook of a language model, or one transcoder on a pair of hooks.

    Args:
        cfg: SAELens' runner config. `model_name` may also be the embedded model's name or a folder
            with a model and its tokenizer; an empty `dataset_path` then means the text of the
            `demo` extra.
        override_dataset, override_model, override_sae: as in SAELens.
        metrics_path: where to append the metrics as JSON lines; `metrics.jsonl` in the output
            folder by default. Every line is complete when it is written.

    Raises:
        ValueError: the hook does not exist, its width is not the SAE's d_in, or the output folder
            already holds an SAE.
    """

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: Any = None,
        override_model: Any = None,
        override_sae: TrainingSAE[Any] | None = None,
        metrics_path: str | Path | None = None,
    ):
        refuse_used_output_folder(cfg.output_path)
        if override_model is None and is_local_model(cfg.model_name):
            override_model = load_model(
                cfg.model_name, "HookedSAETransformer", cfg.llm_device or cfg.device
            )
        if override_dataset is None and not cfg.dataset_path and override_model is not None:
            override_dataset = tokenized_dataset(
                override_model.tokenizer, cfg.context_size, split="train"
            )
        torch.manual_seed(cfg.seed)
        super().__init__(cfg, override_dataset, override_model, override_sae)
        refuse_wrong_hook(self.model, cfg.hook_name, cfg.sae.d_in, cfg.hook_head_index)
        if isinstance(self.sae, JumpReLUTrainingTranscoder):
            self._read_pairs(self.sae.cfg)
        if metrics_path is None and cfg.output_path is not None:
            metrics_path = Path(cfg.output_path, METRICS_FILENAME)
        self.metrics_path = None if metrics_path is None else Path(metrics_path)

    def _read_pairs(self, transcoder: JumpReLUTranscoderTrainingConfig) -> None:
        """Have the store give rows [input ‖ output], and evaluate what is trained on them."""
        pair = HookPair(self.cfg.hook_name, output_hook(transcoder))
        refuse_wrong_hook(self.model, pair.hook_out, transcoder.width_out, width_field="d_out")
        widths = pair_widths(self.model, [pair], self.cfg.hook_head_index)
        transcoder.metadata.hook_name_out = pair.hook_out
        self.activations_store = PairStore.like(
            self.activations_store, {"": pair}, widths, self.cfg.seed
        )
        self.evaluator = TranscoderEvaluator(  # type: ignore[assignment]
            self.model, self.activations_store, self.cfg.n_eval_batches
        )

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        ours = JumpReLUTrainer(
            cfg=trainer.cfg,
            sae=trainer.sae,
            data_provider=trainer.data_provider,
            evaluator=trainer.evaluator,
            save_checkpoint_fn=trainer.save_checkpoint_fn,
        )
        ours.metrics_path = self.metrics_path
        if isinstance(self.sae, JumpReLUTrainingTranscoder):
            ours.activation_scaler = PairScaler(self.sae.cfg.d_in, self.sae.cfg.width_out)
        if self.cfg.resume_from_checkpoint is not None:
            ours.load_trainer_state(self.cfg.resume_from_checkpoint)
        return super().run_trainer_with_interruption_handling(ours)


def is_local_model(model_name: str) -> bool:
    """Whether a model name is the embedded model's or a folder's, and no hub is needed."""
    return model_name == EMBEDDED_MODEL or Path(model_name, "config.json").exists()


def refuse_used_output_folder(output_path: str | None) -> None:
    """Raise ValueError if a run would overwrite an SAE."""
    if output_path is not None and Path(output_path, SAE_CFG_FILENAME).exists():
        raise ValueError(
            f"the output folder {output_path} already holds an SAE ({SAE_CFG_FILENAME}); "
            "give another output_path, or move the SAE away"
        )


def output_hook(transcoder: JumpReLUTranscoderTrainingConfig) -> str:
    """The output hook a transcoder's config names.

    Raises:
        ValueError: it names none.
    """
    hook = transcoder.hook_name_out or transcoder.metadata.hook_name_out
    if not hook:
        raise ValueError(
            "a transcoder needs an output hook: set hook_name_out in its config, for example "
            "hook_name='blocks.3.ln2.hook_normalized' with hook_name_out='blocks.3.hook_mlp_out'"
        )
    return hook


def refuse_wrong_hook(
    model: Any, hook_name: str, d_in: int, head: int | None = None, width_field: str = "d_in"
) -> None:
    """Raise ValueError if the model has no such hook or its activations are not d_in wide."""
    if hook_name not in model.hook_dict:
        close = difflib.get_close_matches(hook_name, list(model.hook_dict), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"the model has no hook {hook_name!r}{hint}")
    width = hook_width(model, hook_name, head)
    if width != d_in:
        flattened = " (heads flattened)" if hook_name.endswith("hook_z") else ""
        raise ValueError(
            f"the SAE's {width_field} is {d_in}, but the activations at {hook_name} are "
            f"{width} wide{flattened}: set {width_field}={width}"
        )


@torch.no_grad()
def hook_width(model: Any, hook_name: str, head: int | None = None) -> int:
    """Width of a hook's activations, heads flattened (or of one head), from a forward pass."""
    device = next(model.parameters()).device
    tokens = torch.zeros((1, 2), dtype=torch.long, device=device)
    cache = model.run_with_cache(tokens, names_filter=[hook_name], prepend_bos=False)[1]
    shape = cache[hook_name].shape
    return shape[-1] if head is not None else shape[2:].numel()
