"""Anthropic's recipe of January 2025."""

from jumprelu_plugin.recipes.recipe import Recipe

ANTHROPIC_2025 = Recipe(
    name="anthropic_2025",
    source="Anthropic, Circuits Updates January 2025 (transformer-circuits.pub/2025/january-update)"
    ", on dictionary learning",
    about="Give l0_coefficient, which rises over the whole run, or target_l0 to have it measured "
    "instead. A wide window whose gradient reaches every parameter, a penalty that saturates, and "
    "a pull on latents below their threshold. The decoder is free: call fold_W_dec_norm on the "
    "trained SAE for unit rows.",
    sae={
        "hyperparameter_units": "sqrt_d",  # E‖x‖ = √d_in
        "normalize_activations": "expected_average_only_in",
        "jumprelu_init_threshold": 0.1,
        "log_threshold": False,  # θ or log θ: readings of the update differ
        "jumprelu_bandwidth": 2.0,
        "jumprelu_sparsity_loss_mode": "tanh",
        "jumprelu_tanh_scale": 4.0,
        "jumprelu_ste_to_input": True,  # to all parameters
        "pre_act_loss_coefficient": 3e-6,
        "pre_act_loss_latents": "all",  # SAELens' own takes dead latents alone
        "unit_norm_decoder": False,
        "initialization": "anthropic",  # W_dec, W_enc, and b_enc from the first batch
        "apply_b_dec_to_input": False,  # f = JumpReLU(W_enc x + b_enc)
        # With target_l0, nothing that our own config adds.
        "resample_dead_latents": False,
        "matryoshka_loss_weight": 0.0,
    },
    runner={
        "lr": 2e-4,
        "lr_end": 0.0,
        "train_batch_size_tokens": 32_768,
    },
    decay_share=0.2,  # the learning rate falls over the last 20 %
    penalty_share=1.0,  # λ rises over the whole run
)
