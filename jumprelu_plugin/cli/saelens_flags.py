"""SAELens' runner flags, read into its config, with our fields and options among them.

The parser is built as SAELens builds its own: simple_parsing makes a flag of every field of the
runner's config and of the config that `--architecture` names. On top of that
  - `-` and `_` mean the same in a flag, and a list may be written 2,3;
  - the help is complete: a class's docstring counts before its bases', so a field whose meaning
    changed says so, and what SAELens leaves without help is described here;
  - a wrong flag is an error of one line. SAELens answers it with its whole usage, and a wrong
    value with a traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import NoneType
from typing import Any, get_args

import simple_parsing
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from typing_extensions import override

from jumprelu_plugin.cli.field_help import field_help
from jumprelu_plugin.models.number_lists import whole_numbers
from jumprelu_plugin.recipes import get_recipe
from jumprelu_plugin.training.health.schedule import usual_learning_rate
from jumprelu_plugin.training.requirements import require_possible_numbers, sequences_of

DEFAULT_ARCHITECTURE = "jumprelu"
# In the buffer, where nothing says how many sequences it holds and the default is less than one.
MIXED_BATCHES = 4

# What SAELens has no help for.
UNDOCUMENTED = {
    "log_to_wandb": "log to Weights & Biases.",
    "log_activations_store_to_wandb": "not used by SAELens.",
    "log_optimizer_state_to_wandb": "not used by SAELens.",
    "log_weights_to_wandb": "upload the weights that are saved.",
    "wandb_project": "project on Weights & Biases.",
    "wandb_id": "id of the run on Weights & Biases.",
    "run_name": "name of the run. Default: architecture, width, lr and tokens.",
    "wandb_entity": "user or team on Weights & Biases.",
    "wandb_log_frequency": "training steps between two logs.",
    "eval_every_n_wandb_logs": "logs between two evaluations.",
    "d_in": "width of the activations at the hook.",
    "d_sae": "number of latents.",
    "dtype": "data type of the SAE's parameters.",
    "device": "where the SAE is made; the runner moves it to its own device.",
    "apply_b_dec_to_input": "subtract the decoder bias from the input.",
    "normalize_activations": "how inputs are scaled before the SAE.",
    "reshape_activations": "hook_z: flatten the heads of attn.hook_z.",
    "metadata": argparse.SUPPRESS,  # the runner sets it
}
# Where the command does more than SAELens' config.
CHANGED = {
    "lr": "learning rate. Where none is given, train, train-many and check find that of an SAE or "
    "transcoder with target_l0 from the run's size.",
    "n_batches_in_buffer": "sequences that are mixed before they are trained on; where 20 hold "
    "less than a batch, four batches.",
    "compile_sae": "compile the training step with torch.compile; not of this package's "
    "architectures, which have their own kernels.",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """What reads the flags, for the help.

    Attributes:
        usage: how it is called.
        parameters: its own options, as typer declares them; typer has read them already.
    """

    usage: str = "jumprelu train"
    about: str = ""
    parameters: Sequence[Any] = ()


def run_config(given: Sequence[str], recipe: str | None, command: Command) -> Any:
    """SAELens' config from its flags, and from a recipe where they leave something out.

    Where neither says how many sequences are mixed, and SAELens' default does not hold a batch, it
    is four batches. Where neither names `lr`, it follows from the run's size for an SAE that trains
    in the units which that rule is for (`control.learning_rate`).

    Raises:
        ValueError: as `parse_flags` does, a number that cannot be, or there is no such recipe.
        SystemExit: with code 0, after `--help` has been printed.
    """
    given = normalized(given)
    chosen = None if recipe is None else get_recipe(recipe)
    # The user's own flags come last, and the last one counts.
    flags = [*(chosen.flags() if chosen else ()), *given]
    named = flag_names(given)
    flags, cfg = with_a_batch_in_the_buffer(flags or ["--help"], named, command)
    require_possible_numbers(cfg)
    if "--lr" not in named:
        rate = usual_learning_rate(cfg) if chosen is None else chosen.learning_rate_of(cfg)
        if rate is not None and rate != cfg.lr:  # read again, for what SAELens derives from lr
            cfg = parse_flags([*flags, f"--lr={rate}"], command)
    if chosen is not None:
        chosen.adapt_to_run(cfg, named)
    return cfg


def flag_names(flags: Sequence[str]) -> set[str]:
    """The names of flags that may be written --NAME=VALUE, and the values that stand alone."""
    return {flag.partition("=")[0] for flag in flags}


def with_a_batch_in_the_buffer(
    flags: list[str], named: Collection[str], command: Command
) -> tuple[list[str], LanguageModelSAERunnerConfig[Any]]:
    """The flags and their config, with four batches in the mixing buffer where none of the user's
    flags (`named`) says how many, and SAELens' default does not hold one.

    Raises:
        ValueError, SystemExit: as `parse_flags` does.
    """
    cfg = parse_flags(flags, command)
    # SAELens' default is 20 sequences, whatever a batch takes.
    too_small = cfg.n_batches_in_buffer < sequences_of(cfg, batches=1)
    if too_small and "--n_batches_in_buffer" not in named:
        flags = [*flags, f"--n_batches_in_buffer={sequences_of(cfg, batches=MIXED_BATCHES)}"]
        cfg = parse_flags(flags, command)
    return flags, cfg


def parse_flags(
    flags: Sequence[str], command: Command | None = None
) -> LanguageModelSAERunnerConfig[Any]:
    """The config that `flags` describe; the last of a repeated flag counts.

    Raises:
        ValueError: an unknown flag or architecture, or a value that a flag cannot hold.
        SystemExit: with code 0, after `--help` has been printed.
    """
    flags, command = normalized(flags), command or Command()
    first = _Parser(command.usage, add_help=False, allow_abbrev=False)
    _add_architecture(first)
    architecture = first.parse_known_args(flags)[0].architecture
    try:
        return _parser(architecture, command).parse_args(flags).cfg
    except ZeroDivisionError:  # SAELens counts steps, logs and windows
        raise ValueError(
            "train_batch_size_tokens, wandb_log_frequency or feature_sampling_window is 0; give at "
            "least 1"
        ) from None


def normalized(flags: Sequence[str]) -> list[str]:
    """The arguments with `_` for `-` in flags' names: --d-sae=41 becomes --d_sae=41."""
    found: list[str] = []
    for flag in flags:
        name, equals, value = flag.partition("=")
        if name.startswith("--"):
            name = f"--{name[2:].replace('-', '_')}"
        found.append(f"{name}{equals}{value}")
    return found


class _Parser(simple_parsing.ArgumentParser):
    """simple_parsing's, with its groups named, and an error instead of a usage page."""

    def __init__(self, usage: str, **options: Any) -> None:
        self.titles: dict[str, tuple[str, str]] = {}
        super().__init__(prog=usage, usage=f"{usage} [--flag value …]", **options)
        # As argparse of Python 3.14 has it: -5,None is a value, and no flag.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    @override
    def error(self, message: str) -> Any:
        raise ValueError(f"{message}; `{self.prog} --help` lists the flags and what they take")

    @override
    def add_argument_group(
        self, title: str | None = None, description: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        # simple_parsing's title is the class and where its values go.
        name = (title or "").partition(" [")[0]
        title, description = self.titles.get(name, (title, description))
        return super().add_argument_group(title, description, *args, **kwargs)


def _parser(architecture: str, command: Command) -> _Parser:
    config = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    run = dataclasses.make_dataclass(
        "CommandLineRunnerConfig",
        [
            (
                "sae",
                config,
                dataclasses.field(default_factory=partial(config, d_in=512, d_sae=1024)),
            )
        ],
        bases=(LanguageModelSAERunnerConfig,),
    )
    parser = _Parser(command.usage, description=command.about)
    parser.titles = {
        run.__qualname__: ("the run", ""),
        LoggingConfig.__qualname__: ("logging to Weights & Biases", ""),
        config.__qualname__: (f"the SAE: --architecture {architecture}", ""),
    }
    own = parser.add_argument_group("jumprelu-plugin")
    _add_architecture(own)
    for parameter in command.parameters:
        if parameter.param_type_name == "option":
            names = [*parameter.opts, *parameter.secondary_opts]
            metavar = None if parameter.is_flag else parameter.name.upper()
            own.add_argument(*names, help=parameter.help, metavar=metavar, action=_Shown)
    runner = parser.add_arguments(run, dest="cfg")
    for wrapper in (runner, *runner.descendants):
        documented = {**UNDOCUMENTED, **field_help(wrapper.dataclass), **CHANGED}
        for field in wrapper.fields:
            field.help = _escaped(documented.get(field.name, ""))
            if field.name in LIST_FLAGS:
                read, metavar = LIST_FLAGS[field.name]
                field.arg_options.update(nargs="+", type=read, metavar=metavar, action=_Concatenate)
            elif NoneType in get_args(field.type):
                # Else the word would be the name of a folder, say, and no number.
                field.arg_options.update(type=_or_none(field.arg_options["type"]))
    return parser


def _add_architecture(parser: Any) -> None:
    parser.add_argument(
        "--architecture",
        "--sae",
        choices=list(SAE_TRAINING_CLASS_REGISTRY),
        default=DEFAULT_ARCHITECTURE,
        metavar="NAME",
        help=f"what is trained, one of {', '.join(SAE_TRAINING_CLASS_REGISTRY)}; the fields of its "
        "config are flags too",
    )


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


class _Shown(argparse.Action):
    """An option that is shown in the help and read elsewhere."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, help: str, metavar: str | None
    ) -> None:
        super().__init__(
            option_strings,
            dest=argparse.SUPPRESS,
            nargs=0 if metavar is None else None,
            default=argparse.SUPPRESS,
            help=help,
            metavar=metavar,
        )

    @override
    def __call__(self, *_: Any) -> None:
        pass


# ---------------------------------------------------------------- lists


class _Concatenate(argparse.Action):
    """One list of all words after the flag, which may each be a list: 2,3 and 2 3 are the same."""

    @override
    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        found: Any = [value for part in values for value in part]
        is_slice = self.dest.endswith("seqpos_slice")
        if len(found) == 1 and (isinstance(found[0], bool) or (found[0] is None and not is_slice)):
            (found,) = found
        elif is_slice and len(found) > 3:
            message = f"it has {len(found)} parts; give start,stop or start,stop,step"
            raise argparse.ArgumentError(self, message)
        setattr(namespace, self.dest, found)


def _whole_numbers(text: str) -> list[int]:
    try:
        return list(whole_numbers("it", text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def read_or_none(text: str) -> Any:
        return None if text.lower() == "none" else read(text)

    read_or_none.__name__ = read.__name__  # argparse says it of a wrong value
    return read_or_none


def _widths(text: str) -> list[int] | list[None]:
    return [None] if text.lower() == "none" else _whole_numbers(text)


def _slice(text: str) -> list[int | None]:
    try:
        return [None if part.lower() == "none" else int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"it is {text!r}; give start,stop or start,stop,step, such as 1,None"
        ) from None


def _special_tokens(text: str) -> list[bool] | list[int]:
    if text.lower() in ("true", "false"):
        return [text.lower() == "true"]
    return _whole_numbers(text)


LIST_FLAGS = {
    "exclude_special_tokens": (_special_tokens, "True|False|2,3"),
    "seqpos_slice": (_slice, "1,None"),
    "matryoshka_widths": (_widths, "32,64"),
}
