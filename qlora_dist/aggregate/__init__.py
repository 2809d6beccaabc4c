"""Adapters in, adapter out: averaging, outer optimizers, merging methods."""
