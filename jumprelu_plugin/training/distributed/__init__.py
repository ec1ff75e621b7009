"""One training over many processes, with `torch.distributed`: latents are sharded.

layout       which latents each process holds
processes    the values that processes exchange in a step (`step.processes`), counted
sharded_sae  the training SAE of one shard
gathering    the whole dictionary from its shards, and the shards from a whole one
trainer      the trainer of one shard: saves whole checkpoints, stops together
launch       the processes torchrun started: who they are, and how an error ends them all
runner       `jumprelu train` on many processes
"""
