"""The pipeline's state through torch.save, and what is refused."""
