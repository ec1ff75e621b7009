"""Several dictionaries trained in lockstep on one harvest of a model's activations.

config   one run's config from each dictionary's own
memory   what all of them take at the peak
check    what is found out before the run
trainer  SAELens' multi-SAE trainer: monitored, recorded, checkpoints whole or absent
runner   SAELens' multi-SAE runner: checked, resumed exactly, final folders whole
"""
