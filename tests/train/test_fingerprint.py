"""Fingerprints: equal for equal gradients, different otherwise."""
