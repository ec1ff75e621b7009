from . import circuits as circuits
from .analysis.dashboard import write_dashboard as write_dashboard
from .analysis.steering import Ablate as Ablate
from .analysis.steering import Add as Add
from .analysis.steering import Clamp as Clamp
from .analysis.steering import steer as steer
from .evaluation.report import evaluate as evaluate
from .evaluation.spliced_set import evaluate_transcoders as evaluate_transcoders
from .finetune.activations import harvest_activations as harvest_activations
from .finetune.l0_sweep import run_l0_sweep as run_l0_sweep
from .finetune.refit import RefitSettings as RefitSettings
from .finetune.runner import FinetuningRunner as FinetuningRunner
from .formats.reading import load_dictionary as load_dictionary
from .formats.targets import export as export
from .models.language_models import EMBEDDED_MODEL as EMBEDDED_MODEL
from .models.language_models import load_model as load_model
from .models.text import corpus as corpus
from .models.text import tokenized_dataset as tokenized_dataset
from .models.token_text import TokenTexts as TokenTexts
from .recipes import RECIPES as RECIPES
from .recipes import get_recipe as get_recipe
from .registration import is_registered as is_registered
from .registration import register as register
from .registration import unregister as unregister
from .saes.config import JumpReLUTrainingSAEConfig as JumpReLUTrainingSAEConfig
from .saes.inference import sparse_inference as sparse_inference
from .saes.jumprelu import JumpReLUTrainingSAE as JumpReLUTrainingSAE
from .saes.transcoder import JumpReLUTrainingSkipTranscoder as JumpReLUTrainingSkipTranscoder
from .saes.transcoder import JumpReLUTrainingTranscoder as JumpReLUTrainingTranscoder
from .saes.transcoder_config import (
    JumpReLUTrainingSkipTranscoderConfig as JumpReLUTrainingSkipTranscoderConfig,
)
from .saes.transcoder_config import (
    JumpReLUTrainingTranscoderConfig as JumpReLUTrainingTranscoderConfig,
)
from .step.estimators import heaviside as heaviside
from .step.estimators import jumprelu as jumprelu
from .studies.explain.settings import BackendSettings as BackendSettings
from .studies.explain.settings import ExplainSettings as ExplainSettings
from .studies.explain.study import run_explanation_study as run_explanation_study
from .studies.plot import plot_sweep as plot_sweep
from .studies.rating.questions import make_rating_study as make_rating_study
from .studies.rating.report import write_rating_report as write_rating_report
from .studies.rating.settings import RatingStudySettings as RatingStudySettings
from .studies.sweep.grid import SweepSettings as SweepSettings
from .studies.sweep.run import run_sweep as run_sweep
from .training.activations.cache.reader import ActivationCache as ActivationCache
from .training.activations.cache.settings import CacheSettings as CacheSettings
from .training.activations.cache.settings import cache_activations as cache_activations
from .training.activations.cache.writer import write_activation_cache as write_activation_cache
from .training.runner import JumpReLUTrainingRunner as JumpReLUTrainingRunner
from .transcoders.clt.evaluation import evaluate_clt as evaluate_clt
from .transcoders.clt.folder import load_clt as load_clt
from .transcoders.clt.model import CrossLayerTranscoder as CrossLayerTranscoder
from .transcoders.clt.run import train_clt as train_clt
from .transcoders.per_layer.run import train_transcoders as train_transcoders
from .transcoders.settings import CLTSettings as CLTSettings
from .transcoders.settings import TranscoderSettings as TranscoderSettings

__version__: str
