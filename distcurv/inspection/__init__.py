"""``distcurv inspect``: what would be covered of a model, without training it."""
