"""Preconditioner against the dense Kronecker inverse in float64."""
