"""Anthropic's recipe of January 2025."""

from jumprelu_plugin.recipes.recipe import Recipe

ANTHROPIC_2025 = Recipe(
    name="anthropic_2025",
    source="Anthropic, Circuits Updates January 2025 (transformer-circuits.pub/2025/january-update)"
    ", on dictionary learning",
    description="Set l0_coefficient, which rises over the whole run, or target_l0, for which it is "
    "measured. The estimators' window is wide and their gradient reaches every parameter. The "
    "tanh penalty saturates, and a pre-activation loss raises latents below their threshold. The "
    "decoder rows are not normalized: call fold_W_dec_norm on the trained SAE for unit rows.",
    sae={
        "hyperparameter_units": "sqrt_d",  # E‖x‖ = √d_in
        "normalize_activations": "expected_average_only_in",
        "jumprelu_init_threshold": 0.1,
        "log_threshold": False,  # the update does not say whether θ or log θ is trained
        "jumprelu_bandwidth": 2.0,
        "jumprelu_sparsity_loss_mode": "tanh",
        "jumprelu_tanh_scale": 4.0,
        "jumprelu_ste_to_input": True,  # to all parameters
        "pre_act_loss_coefficient": 3e-6,
        "pre_act_loss_latents": "all",  # SAELens restricts it to dead latents
        "unit_norm_decoder": False,
        "initialization": "anthropic",  # W_dec, W_enc, and b_enc from the first batch
        "apply_b_dec_to_input": False,  # f = JumpReLU(W_enc x + b_enc)
        # Nothing beyond the update, also with target_l0.
        "resample_dead_latents": False,
    },
    runner={
        "lr": 2e-4,
        "lr_end": 0.0,
        "train_batch_size_tokens": 32_768,
    },
    lr_decay_fraction=0.2,  # the learning rate falls over the last 20 %
    l0_warm_up_fraction=1.0,  # λ rises over the whole run
)
