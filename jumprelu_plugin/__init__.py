"""JumpReLU sparse autoencoders in SAELens' training runners: faster, and at the L0 you ask for.

Importing the package registers it: `architecture="jumprelu"` then trains `JumpReLUTrainingSAE`.
"""

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import lazy_loader

from jumprelu_plugin import registration

__version__ = "0.1.0"

# Every name a user needs. Type checkers see these imports. At run time what follows reads the
# indented ones and loads each name when it is first asked for.
if TYPE_CHECKING:
    from jumprelu_plugin import circuits as circuits
    from jumprelu_plugin.analysis.dashboard import write_dashboard as write_dashboard
    from jumprelu_plugin.analysis.steering import Ablate as Ablate
    from jumprelu_plugin.analysis.steering import Add as Add
    from jumprelu_plugin.analysis.steering import Clamp as Clamp
    from jumprelu_plugin.analysis.steering import steer as steer
    from jumprelu_plugin.evaluation.report import evaluate as evaluate
    from jumprelu_plugin.evaluation.spliced_set import evaluate_transcoders as evaluate_transcoders
    from jumprelu_plugin.finetune.activations import harvest_activations as harvest_activations
    from jumprelu_plugin.finetune.l0_sweep import run_l0_sweep as run_l0_sweep
    from jumprelu_plugin.finetune.refit import RefitSettings as RefitSettings
    from jumprelu_plugin.finetune.runner import FinetuningRunner as FinetuningRunner
    from jumprelu_plugin.formats.reading import load_dictionary as load_dictionary
    from jumprelu_plugin.formats.targets import export as export
    from jumprelu_plugin.models.language_models import EMBEDDED_MODEL as EMBEDDED_MODEL
    from jumprelu_plugin.models.language_models import load_model as load_model
    from jumprelu_plugin.models.text import corpus as corpus
    from jumprelu_plugin.models.text import tokenized_dataset as tokenized_dataset
    from jumprelu_plugin.models.token_text import TokenTexts as TokenTexts
    from jumprelu_plugin.recipes import RECIPES as RECIPES
    from jumprelu_plugin.recipes import get_recipe as get_recipe
    from jumprelu_plugin.registration import is_registered as is_registered
    from jumprelu_plugin.registration import register as register
    from jumprelu_plugin.registration import unregister as unregister
    from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig as JumpReLUTrainingSAEConfig
    from jumprelu_plugin.saes.inference import sparse_inference as sparse_inference
    from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE as JumpReLUTrainingSAE
    from jumprelu_plugin.saes.transcoder import (
        JumpReLUTrainingSkipTranscoder as JumpReLUTrainingSkipTranscoder,
    )
    from jumprelu_plugin.saes.transcoder import (
        JumpReLUTrainingTranscoder as JumpReLUTrainingTranscoder,
    )
    from jumprelu_plugin.saes.transcoder_config import (
        JumpReLUTrainingSkipTranscoderConfig as JumpReLUTrainingSkipTranscoderConfig,
    )
    from jumprelu_plugin.saes.transcoder_config import (
        JumpReLUTrainingTranscoderConfig as JumpReLUTrainingTranscoderConfig,
    )
    from jumprelu_plugin.step.estimators import heaviside as heaviside
    from jumprelu_plugin.step.estimators import jumprelu as jumprelu
    from jumprelu_plugin.studies.explain.settings import BackendSettings as BackendSettings
    from jumprelu_plugin.studies.explain.settings import ExplainSettings as ExplainSettings
    from jumprelu_plugin.studies.explain.study import run_explanation_study as run_explanation_study
    from jumprelu_plugin.studies.plot import plot_sweep as plot_sweep
    from jumprelu_plugin.studies.rating.questions import make_rating_study as make_rating_study
    from jumprelu_plugin.studies.rating.report import write_rating_report as write_rating_report
    from jumprelu_plugin.studies.rating.settings import RatingStudySettings as RatingStudySettings
    from jumprelu_plugin.studies.sweep.grid import SweepSettings as SweepSettings
    from jumprelu_plugin.studies.sweep.run import run_sweep as run_sweep
    from jumprelu_plugin.training.activations.cache.reader import ActivationCache as ActivationCache
    from jumprelu_plugin.training.activations.cache.settings import CacheSettings as CacheSettings
    from jumprelu_plugin.training.activations.cache.settings import (
        cache_activations as cache_activations,
    )
    from jumprelu_plugin.training.activations.cache.writer import (
        write_activation_cache as write_activation_cache,
    )
    from jumprelu_plugin.training.multi.runner import (
        JumpReLUMultiTrainingRunner as JumpReLUMultiTrainingRunner,
    )
    from jumprelu_plugin.training.runner import JumpReLUTrainingRunner as JumpReLUTrainingRunner
    from jumprelu_plugin.transcoders.clt.evaluation import evaluate_clt as evaluate_clt
    from jumprelu_plugin.transcoders.clt.folder import load_clt as load_clt
    from jumprelu_plugin.transcoders.clt.model import CrossLayerTranscoder as CrossLayerTranscoder
    from jumprelu_plugin.transcoders.clt.run import train_clt as train_clt
    from jumprelu_plugin.transcoders.per_layer.run import train_transcoders as train_transcoders
    from jumprelu_plugin.transcoders.settings import CLTSettings as CLTSettings
    from jumprelu_plugin.transcoders.settings import TranscoderSettings as TranscoderSettings

_modules, _names = set(), {}
for _node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8"))):
    if isinstance(_node, ast.ImportFrom) and _node.col_offset:
        _imported = [alias.name for alias in _node.names]
        _room = (_node.module or "").partition(".")[2]
        if _room:
            _names.setdefault(_room, []).extend(_imported)
        else:
            _modules.update(_imported)
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, _modules, _names)

registration.register()
