"""The likelihoods by name, and what else may be given for one."""

from __future__ import annotations

from distcurv.errors import ConfigError
from distcurv.train.likelihoods.bernoulli import Bernoulli
from distcurv.train.likelihoods.categorical import Categorical
from distcurv.train.likelihoods.gaussian import Gaussian
from distcurv.train.likelihoods.likelihood import CountsTerms, HasHessian, Likelihood

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "CountsTerms",
    "Gaussian",
    "HasHessian",
    "Likelihood",
    "as_likelihood",
]

LIKELIHOODS: dict[str, type[Categorical | Bernoulli | Gaussian]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}


def as_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood itself, or a new one by its name in `LIKELIHOODS` with default settings.

    Raises `ConfigError` for anything else."""
    if isinstance(likelihood, str):
        if likelihood not in LIKELIHOODS:
            raise ConfigError(
                f"likelihood is {likelihood!r}: use one of {', '.join(LIKELIHOODS)}, or an object"
            )
        return LIKELIHOODS[likelihood]()
    if isinstance(likelihood, type) or not isinstance(likelihood, Likelihood):
        raise ConfigError(
            f"likelihood is {likelihood!r}: give an object with the methods "
            "sample(logits, generator) and nll(logits, targets), e.g. Categorical()"
        )
    return likelihood
