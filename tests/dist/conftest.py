"""One pool of two processes for all tests of this folder."""

from collections.abc import Iterator

import pytest
from forked import Pool, pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Give two processes joined by gloo: ``ranks.run(function, *args) -> [result of rank 0, of rank 1]``."""
    with pool(2) as made:
        yield made
