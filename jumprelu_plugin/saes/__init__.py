"""The training SAEs: thin, joining parameters, objective and step to SAELens' classes."""
