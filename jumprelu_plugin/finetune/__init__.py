"""Training that starts from a pretrained SAE: finetune it, or refit it to other L0s."""
