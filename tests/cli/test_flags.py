"""The command line against what it sets: each field has a flag with help, and two spellings.

A flag that is wrong is one message and exit code 2, and nothing is written.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
import typer
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.cli.field_help import field_help
from jumprelu_plugin.cli.saelens_flags import Command, parse_flags, run_config
from jumprelu_plugin.control.learning_rate import learning_rate
from jumprelu_plugin.models.number_lists import numbers, whole_numbers
from jumprelu_plugin.models.options import ModelOptions
from jumprelu_plugin.recipes.anthropic_2025 import ANTHROPIC_2025
from jumprelu_plugin.transcoders.settings import CLTSettings, TranscoderSettings

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SAELENS_COMMANDS = ("train", "check", "finetune")


def options(command: str) -> dict[str, Any]:
    """A command's own options, by name."""
    return {
        parameter.name: parameter
        for parameter in COMMANDS[command].params
        if parameter.param_type_name == "option"
    }


def run(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).invoke(
        app, [str(argument) for argument in arguments]
    )


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help_and_is_documented_with_underscores(command: str) -> None:
    assert COMMANDS[command].help
    for parameter in COMMANDS[command].params:
        assert parameter.help, parameter.name
        for flag in (*parameter.opts, *parameter.secondary_opts):
            assert "-" not in flag.removeprefix("--"), flag


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("train-transcoders", TranscoderSettings),
        ("train-clt", CLTSettings),
        ("evaluate", ModelOptions),
        ("steer", ModelOptions),
        ("dashboard", ModelOptions),
        ("l0-sweep", ModelOptions),
    ],
)
def test_every_field_of_the_settings_is_an_option(command: str, settings: Any) -> None:
    shown = run(command, "--help").output
    documented = field_help(settings)
    for field in dataclasses.fields(settings):
        option = options(command)[field.name]
        assert option.opts == [f"--{field.name}"] and f"--{field.name}" in shown
        assert option.help.replace("\\[", "[") == documented[field.name]
        if not isinstance(field.default, tuple):
            assert option.default == field.default


@pytest.mark.parametrize("architecture", SAE_TRAINING_CLASS_REGISTRY)
def test_the_help_of_train_has_every_field(
    architecture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = help_of(capsys, "--architecture", architecture)
    config = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    # `sae` and `logger` are groups of flags; SAELens' runner sets the metadata.
    for made in (LanguageModelSAERunnerConfig, LoggingConfig, config):
        for field in dataclasses.fields(made):
            if field.name not in ("sae", "logger", "metadata"):
                assert f"--{field.name}" in shown
                # The classes that this package does not own may document less.
                if made is not config or architecture.startswith("jumprelu"):
                    assert shown[f"--{field.name}"], field.name


def test_the_help_of_train_has_every_flag_of_saelens(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(capsys, "--architecture", "jumprelu")
    with pytest.raises(SystemExit):
        _parse_cfg_args(["--architecture", "jumprelu", "--help"])
    theirs = flags_in(capsys.readouterr().out)
    assert len(theirs) > 90
    assert set(theirs) - set(shown) == {"--metadata"}


def test_check_takes_what_train_takes() -> None:
    assert options("train").keys() <= options("check").keys()


@pytest.mark.parametrize(
    ("command", "own"),
    [
        ("train", ["--recipe", "--no_save_buffer", "--no_check_first"]),
        ("check", ["--recipe"]),
        ("finetune", ["--no_save_buffer"]),
    ],
)
def test_the_help_names_the_command_and_its_own_options(command: str, own: list[str]) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    usage = "jumprelu finetune SOURCE" if command == "finetune" else f"jumprelu {command}"
    assert result.output.startswith(f"usage: {usage} [--flag value")
    shown = flags_in(result.output)
    assert all(shown[flag] for flag in own)


def test_a_field_whose_meaning_changed_has_our_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "ignored otherwise" not in help_of(capsys)["--target_l0"]
    for flag, text in help_of(capsys).items():
        documented = field_help(SAE_TRAINING_CLASS_REGISTRY["jumprelu"][1])
        if flag == "--target_l0":
            assert documented["target_l0"].split()[0] in text


def help_of(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, str]:
    with pytest.raises(SystemExit) as stop:
        parse_flags([*flags, "--help"])
    assert stop.value.code == 0
    return flags_in(capsys.readouterr().out)


def flags_in(shown: str) -> dict[str, str]:
    """Flags of an argparse help and their texts, without the default."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n  (?=-)", shown):
        head, *body = re.split(r" {2,}|\n\n", entry.partition("\n\n")[0])
        text = re.sub(r"\(default:.*?\)", "", " ".join(body), flags=re.S).strip()
        for name in re.findall(r"--[\w.]+", head):
            found[name.replace("--sae.", "--")] = text or found.get(name, "")
    return found


def test_help_is_read_from_docstrings() -> None:
    class Base:
        """Of what.

        Args:
            a (int | None): one
                line more.
            b, c: both.

        Not: an entry.
        """

    class Child(Base):
        """More.

        Attributes:
            c: another.
                Raises: not an entry either.
        """

    assert field_help(Child) == {
        "a": "one line more.",
        "b": "both.",
        "c": "another. Raises: not an entry either.",
    }


# ---------------------------------------------------------------- spelling


def test_a_dash_and_an_underscore_are_the_same(tmp_path: Path) -> None:
    given = "--d-sae=41 --target_l0 7 --train-batch-size-tokens 31 --nostreaming"
    one, other = (
        parse_flags(text.split()).to_dict()
        for text in (given, given.replace("-", "_").replace("__", "--"))
    )
    for cfg in (one, other):
        cfg.pop("checkpoint_path")
    assert one == other and one["sae"]["d_sae"] == 41
    for command, flag in (
        ("evaluate", "--context_size"),
        ("train-clt", "--train_batch_size_tokens"),
        ("export", "--n_layers"),
        ("demo", "--output_path"),
    ):
        for spelling in (flag, "--" + flag[2:].replace("_", "-")):
            result = run(command, spelling)
            assert result.exit_code == 2 and "requires an argument" in result.output, result.output
    for spelling in ("--no_check_first", "--no-check-first"):
        result = run("train", spelling, "--d_in", "wide")
        assert result.exit_code == 2 and "--d_in: invalid int value" in result.output


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--exclude_special_tokens 2,3", "exclude_special_tokens", [2, 3]),
        ("--exclude-special-tokens 2 3", "exclude_special_tokens", [2, 3]),
        ("--exclude_special_tokens True", "exclude_special_tokens", True),
        ("--exclude_special_tokens false", "exclude_special_tokens", False),
        ("--seqpos_slice 1,None", "seqpos_slice", (1, None)),
        ("--seqpos_slice=1,-5", "seqpos_slice", (1, -5)),
        ("--seqpos_slice 1 9 2", "seqpos_slice", (1, 9, 2)),
        ("--seqpos_slice -5,None", "seqpos_slice", (-5, None)),
        ("--seqpos_slice None", "seqpos_slice", (None,)),
        ("--matryoshka_widths 16,32", "sae.matryoshka_widths", [16, 32]),
        ("--matryoshka_widths 16 32", "sae.matryoshka_widths", [16, 32]),
        ("--matryoshka_widths none", "sae.matryoshka_widths", None),
        ("", "exclude_special_tokens", False),
        ("", "seqpos_slice", (None,)),
    ],
)
def test_lists_of_saelens_are_taken(flags: str, field: str, value: Any) -> None:
    cfg: Any = parse_flags(["--target_l0", "7", *flags.split()])
    owner, _, name = field.rpartition(".")
    assert getattr(getattr(cfg, owner) if owner else cfg, name) == value


def test_lists_are_spelled_alike() -> None:
    assert whole_numbers("--layers", "0-2,7, 9-9") == (0, 1, 2, 7, 9)
    assert whole_numbers("--latents", "-1") == (-1,)
    assert numbers("--l0", "10, 20.5,-3") == (10, 20.5, -3)
    for text in ("", "x", "1,", "3-", "1-2-3"):
        with pytest.raises(ValueError, match=re.escape(f"--layers is {text!r}; give numbers")):
            whole_numbers("--layers", text)
    with pytest.raises(ValueError, match="--l0 is '1-2'; give numbers such as 10,20,40"):
        numbers("--l0", "1-2")


# ---------------------------------------------------------------- the same as SAELens'


@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "batchtopk"])
def test_saelens_flags_give_saelens_config(architecture: str) -> None:
    flags = [
        "--architecture", architecture, "--d_in", "33", "--d_sae", "59", "--lr", "0.003",
        "--hook_name", "blocks.1.x", "--streaming", "False", "--noprepend_bos", "--log_to_wandb",
        "--sae.dtype", "bfloat16", "--dtype", "float32", "--model_kwargs", '{"a": 1}',
        "--lr_end", "0.001", "--prefetch_llm_batches", "3", "--checkpoint_path",
    ]  # fmt: skip
    ours, theirs = parse_flags(flags).to_dict(), _parse_cfg_args(flags).to_dict()
    assert ours == theirs and ours["sae"]["dtype"] == "bfloat16"
    assert ours["streaming"] is ours["prepend_bos"] is False and ours["checkpoint_path"] is None


def test_none_is_no_folder() -> None:
    flags = ["--checkpoint_path", "None", "--output_path=none", "--run_name", "None of them"]
    cfg = parse_flags(["--d_in", "33", *flags])
    assert cfg.checkpoint_path is None and cfg.output_path is None
    assert cfg.logger.run_name == "None of them"


@pytest.mark.parametrize("architecture", ["jumprelu", "jumprelu_transcoder"])
def test_every_optional_field_can_be_set_back_to_none(architecture: str) -> None:
    """As over a recipe's value: the last flag counts."""
    given = {
        bool: "True",
        int: "7",
        float: "0.3",
        str: "words",
        dict[str, Any]: '{"a": 1}',
    }
    kinds = {
        name: kind
        for config in (LanguageModelSAERunnerConfig, SAE_TRAINING_CLASS_REGISTRY[architecture][1])
        for name, hint in get_type_hints(config).items()
        if NoneType in get_args(hint)
        for kind in given
        if kind in get_args(hint)
    }
    assert {"lr_end", "l0_coefficient", "standardize_activations"} <= kinds.keys()
    flags = [
        word
        for value in ("given", "None")
        for name, kind in kinds.items()
        for word in (f"--{name}", given[kind] if value == "given" else value)
    ]
    cfg: Any = parse_flags(["--architecture", architecture, *flags])
    found = {name: getattr(cfg if hasattr(cfg, name) else cfg.sae, name) for name in kinds}
    filled_in = {"d_out": cfg.sae.d_in} if "d_out" in kinds else {}
    assert {name: value for name, value in found.items() if value is not None} == filled_in | {
        "lr_end": cfg.lr / 10,  # SAELens fills these in
        "llm_device": cfg.device,
        "act_store_device": cfg.device,
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
    }


# ---------------------------------------------------------------- found, not given


SIZES = ["--d_in", "33", "--d_sae", "59", "--training_tokens", "410041"]
SIZES += ["--train_batch_size_tokens", "41"]


@pytest.mark.parametrize("recipe", [None, "default"])
def test_the_learning_rate_follows_the_run_where_none_is_given(recipe: str | None) -> None:
    cfg = run_config([*SIZES, "--target_l0", "7"], recipe, Command())
    assert cfg.lr == learning_rate(33, 59, 7.0, 41, 10_001) != 3e-4
    assert cfg.lr_end == cfg.lr / 10 and f"LR-{cfg.lr}-" in cfg.logger.run_name
    given = run_config([*SIZES, "--target_l0", "7", "--lr", "0.0003"], recipe, Command())
    assert given.lr == 3e-4 and given.lr_end == pytest.approx(3e-5)


def test_that_of_a_transcoder_is_at_most_its_recipe_s() -> None:
    flags = [*SIZES, "--architecture", "jumprelu_transcoder", "--target_l0", "7"]
    assert run_config(flags, None, Command()).lr == 4e-3
    longer = [*flags, "--training_tokens", "4100410000"]
    assert run_config(longer, None, Command()).lr == learning_rate(33, 59, 7.0, 41, 100_010_000)


def test_with_a_recipe_that_has_none_of_its_own_the_learning_rate_is_as_without() -> None:
    of_transcoder = [*SIZES, "--architecture", "jumprelu_transcoder", "--target_l0", "7"]
    assert run_config(of_transcoder, "default", Command()).lr == 4e-3
    onwards = [*SIZES, "--target_l0", "7", "--from_pretrained_path", "there"]
    for given in (onwards, [*SIZES, "--l0_coefficient", "0.3"]):
        assert run_config(given, "matryoshka", Command()).lr == LanguageModelSAERunnerConfig.lr
    assert run_config(onwards, "anthropic_2025", Command()).lr == ANTHROPIC_2025.runner["lr"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--l0_coefficient", "0.3"],
        ["--target_l0", "7", "--standardize_activations", "False"],
        ["--target_l0", "7", "--from_pretrained_path", "there"],
        ["--architecture", "batchtopk", "--k", "7"],
    ],
    ids=str,
)
def test_elsewhere_the_learning_rate_is_saelens(flags: list[str]) -> None:
    assert run_config([*SIZES, *flags], None, Command()).lr == LanguageModelSAERunnerConfig.lr


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--no_such", "3"], ["unrecognized arguments: --no_such"]),
        (["train", "--seqpos_slice", "a"], ["--seqpos_slice", "such as 1,None"]),
        (["train", "--exclude_special_tokens", "some"], ["--exclude_special_tokens", "'some'"]),
        (["train", "--train_batch_size_tokens", "0"], ["train_batch_size_tokens", "at least 1"]),
        (["check", "--recipe", "default", "--d_sae", "0"], ["d_sae is 0", "at least 1"]),
        (["train", "--recipe", "default", "--d_in", "-3"], ["d_in is -3", "at least 1"]),
        (["check", "--d_in", "wide"], ["--d_in", "jumprelu check --help"]),
        (["evaluate", "x", "--no_such", "3"], ["No such option", "--no_such"]),
        (["evaluate", "x", "--dtype", "float31"], ["x holds no dictionary"]),
        (["evaluate", "x", "--device", "cuda:99"], ["device is 'cuda:99'"]),
        (["steer", "x"], ["Missing option", "--latent"]),
        (["steer", "x", "--latent", "3", "--tokens", "0"], ["Invalid value for '--tokens'"]),
        (["evaluate", "x", "--sequences", "0"], ["Invalid value for '--sequences'"]),
        (["dashboard", "x", "--examples", "-2"], ["Invalid value for '--examples'"]),
        (["dashboard", "x", "--context_size", "1"], ["Invalid value for '--context_size'"]),
        (["steer", "x", "--latent", "1", "--change", "melt"], ["'melt'", "'add'"]),
        (
            ["steer", "x", "--latent", "1", "--change", "ablate", "--amount", "3"],
            ["--amount 3", "no effect", "--change clamp"],
        ),
        (["dashboard", "x", "--latents", "a"], ["--latents is 'a'"]),
        (["dashboard", "x", "--latents", "7,5-3"], ["--latents is '7,5-3'", "0-5"]),
        (["l0-sweep", "x", "--output_path", "y", "--l0", "10,nan"], ["--l0 is '10,nan'"]),
        (["l0-sweep", "x", "--output_path", "y", "--l0", "few"], ["--l0 is 'few'"]),
        (["train-clt", "--output_path", "y", "--layers", "one"], ["--layers is 'one'"]),
        (["train-clt", "--output_path", "y", "--step_kernel", "x"], ["'x'", "screened"]),
        (["train-clt", "--output_path", "y", "--dtype", "float31"], ["Invalid dtype: float31"]),
        (["export", "x", "--to", "lm-eval", "--output_path", "y", "--latents", "3"], ["1 latents"]),
        (["recipes", "--no_such"], ["No such option"]),
    ],
)
def test_a_wrong_flag_is_one_message(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert all(word in result.output for word in words), result.output
    assert "Traceback" not in result.output and len(result.output.splitlines()) <= 8
    assert list(tmp_path.iterdir()) == []


def test_without_flags_train_shows_its_help() -> None:
    result = run("train")
    assert result.exit_code == 0 and result.output.startswith("usage: jumprelu train")
