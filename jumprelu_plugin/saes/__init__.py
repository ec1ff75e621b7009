"""The training SAEs: thin, they join parameters, objective and step to SAELens' training classes."""
