"""What happens around the step during training: L0 control, calibration, decoder constraint, units.

These files know tensors and optimisers, not SAELens; the SAEs in `saes/` call them, because
SAELens' runners drive a training through the SAE alone.
"""
