"""Routes: the early phase, the worker, and the in-process fall-back."""
