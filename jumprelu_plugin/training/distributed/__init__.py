"""One training over many processes, with `torch.distributed`: latents sharded, batches split.

mesh         the grid of processes: who shares latents with whom, and tokens
layout       which latents each process holds
processes    the values that processes exchange in a step (`step.processes`)
gradients    the gradients of a step: averaged over tokens, their norm clipped
harvest      one harvest of activations for all
sharded_sae  the training SAE of one shard
shares       what one process has of a run's config
division     over how many processes a run is divided, and their shares of a pass of the model
gathering    the whole dictionary from its shards, and the shards from a whole one
trainer      the trainer of one shard: saves whole checkpoints, stops together
agreed       what the processes decide together: when to stop, when to save
launch       the processes torchrun started: who they are, and how an error ends them all
runner       `jumprelu train` on many processes
forecast     what a step exchanges and takes, from sizes and published figures (hardware)
planning     a run looked at before any process starts: `jumprelu check`
"""
