"""`workers=` turned into links: what cannot work is refused at once."""

from __future__ import annotations

import pytest
import torch

from distcurv.errors import ConfigError
from distcurv.train.group import RankGroup
from distcurv.wiring import ENDPOINTS_VARIABLE, owner_links

ONE, TWO = "tcp://127.0.0.1:5555", "tcp://127.0.0.1:5556"


@pytest.fixture
def group() -> RankGroup:
    return RankGroup(torch.device("cpu"))


def test_endpoints_keep_their_order(group: RankGroup) -> None:
    links = owner_links([TWO, ONE], group)
    assert [endpoint for endpoint, _ in links.remotes] == [TWO, ONE]
    links.close()


def test_a_worker_named_twice_is_refused(group: RankGroup) -> None:
    # It would take the owner's second session for a restart and end the first, for ever.
    with pytest.raises(ConfigError, match=f"workers names {ONE} more than once"):
        owner_links([ONE, TWO, ONE], group)


def test_a_worker_named_twice_in_the_environment_too(
    group: RankGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINTS_VARIABLE, f"{ONE},{ONE}")
    with pytest.raises(ConfigError, match="more than once"):
        owner_links("auto", group)


@pytest.mark.parametrize("workers", [[], 3, True, None, ONE, [5]])
def test_other_forms_are_refused(group: RankGroup, workers: object) -> None:
    with pytest.raises(ConfigError, match="workers"):
        owner_links(workers, group)  # type: ignore[arg-type]
