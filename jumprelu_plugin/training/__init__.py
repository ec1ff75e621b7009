"""SAELens' runner and trainer, for runs that are checked first, watched, and never lost."""
