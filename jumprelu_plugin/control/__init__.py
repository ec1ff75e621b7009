"""What happens between two steps of one dictionary: `DictionaryControl` and the controls it holds.

These files know tensors and optimizers, not SAELens.
"""
