"""Hooks that exist and never fire, and activations that are not one vector a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jumprelu_plugin.models.firing import hook_widths, require_firing
from jumprelu_plugin.models.hooks import attached
from tests.families import model_folder
from tests.tiny import N_HEADS, RESIDUAL, tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = {
    "blocks.1.hook_mlp_in": "use_hook_mlp_in",
    "blocks.1.hook_q_input": "use_split_qkv_input",
    "blocks.1.attn.hook_result": "use_attn_result",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_models(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("hook", FLAGS)
@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_a_flag_turns_the_hook_on(hook: str, kind: str, models: Any) -> None:
    model, flag = getattr(models, kind), FLAGS[hook]
    for check in (
        lambda: require_firing(model, RESIDUAL, hook),
        lambda: hook_widths(model, [hook]),
    ):
        with pytest.raises(ValueError, match="exists but does not fire") as error:
            check()
        assert hook in str(error.value) and f"set_{flag}(True)" in str(error.value)
    getattr(model, f"set_{flag}")(True)
    try:
        require_firing(model, RESIDUAL, hook)
    finally:
        getattr(model, f"set_{flag}")(False)


def test_attached_functions_are_left_alone(models: Any) -> None:
    calls: list[Any] = []
    with attached(models.hooked, RESIDUAL, lambda x: calls.append(x.shape)):
        require_firing(models.hooked, RESIDUAL)
        with pytest.raises(ValueError, match="use_hook_mlp_in"):
            require_firing(models.hooked, "blocks.1.hook_mlp_in")
    assert calls == []
    with pytest.raises(ValueError, match="no hook"):
        require_firing(models.hooked, "blocks.9.hook_resid_post")


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_a_pattern_is_not_one_vector_a_token(kind: str, models: Any) -> None:
    assert N_HEADS == 3  # as many as positions in the first probe
    for hook in ("blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"):
        with pytest.raises(ValueError, match=r"\[batch, .*position\], which is not one vector"):
            hook_widths(getattr(models, kind), [hook])
    with pytest.raises(ValueError, match="hook_head_index is set.*no heads"):
        hook_widths(getattr(models, kind), [RESIDUAL], {RESIDUAL: 0})


def test_an_architecture_without_the_hook(tmp_path: Path) -> None:
    """A bridge of a parallel block has a name for what lies between attention and MLP."""
    from jumprelu_plugin.models.language_models import load_model

    model = load_model(model_folder("gptj", tmp_path), "TransformerBridge")
    for hook in ("blocks.1.hook_resid_mid", "blocks.1.ln2.hook_normalized"):
        with pytest.raises(ValueError, match="does not fire|no hook"):
            require_firing(model, hook)
    require_firing(model, "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out")
