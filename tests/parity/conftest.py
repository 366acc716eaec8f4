from __future__ import annotations

import pytest

from tests.parity.pool import Pool


@pytest.fixture(scope="session")
def pool():
    pool = Pool(8)
    yield pool
    pool.close()
