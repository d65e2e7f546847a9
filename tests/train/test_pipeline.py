"""The pipeline in one process, over memory links."""
