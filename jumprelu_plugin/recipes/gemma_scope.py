"""The JumpReLU paper's recipe, as Gemma Scope used it."""

from jumprelu_plugin.recipes.recipe import Recipe

GEMMA_SCOPE = Recipe(
    name="gemma_scope",
    source="Lieberum et al. 2024, Gemma Scope (arXiv 2408.05147), section 3; "
    "Rajamanoharan et al. 2024, Jumping Ahead (arXiv 2407.14435), appendix",
    description="As in the paper: a fixed coefficient, a very small bandwidth, and estimator "
    "gradients for thresholds only. It is meant for billions of tokens; in a short run its "
    "thresholds hardly change.",
    sae={
        "hyperparameter_units": "unit_rms",  # E‖x‖² = 1 (Gemma Scope, 3.1)
        "normalize_activations": "expected_average_only_in",  # one scalar, folded at the end (3.1)
        "jumprelu_init_threshold": 0.001,  # Gemma Scope, 3.2
        "jumprelu_bandwidth": 0.001,  # Gemma Scope, 3.2
        "log_threshold": True,  # Jumping Ahead, appendix (pseudo-code)
        "jumprelu_sparsity_loss_mode": "step",  # Jumping Ahead, eq. 9
        "jumprelu_ste_to_input": False,  # Jumping Ahead, eq. 11-12: to θ alone
        "l0_coefficient": 6e-4,  # within the range that the paper sweeps; the user chooses it
        "l0_warm_up_steps": 10_000,  # Gemma Scope, 3.2: linear
        "unit_norm_decoder": True,  # Gemma Scope, 3.2
        "decoder_init_norm": 1.0,  # He-uniform, then unit norm (3.2)
        "apply_b_dec_to_input": True,  # Jumping Ahead, appendix
    },
    runner={
        "adam_beta1": 0.0,  # Gemma Scope, 3.2
        "adam_beta2": 0.999,  # Gemma Scope, 3.2
        "lr": 7e-5,  # Gemma Scope, 3.2
        # The paper's warm-up follows a cosine from lr/10; SAELens' is linear.
        "lr_warm_up_steps": 1_000,
        "train_batch_size_tokens": 4_096,  # Gemma Scope, 3.2
        "context_size": 1_024,  # Gemma Scope, 3.1
        "exclude_special_tokens": True,  # Gemma Scope, 3.1: BOS, EOS and padding
    },
)
