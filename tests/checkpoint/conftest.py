from __future__ import annotations

import pytest

from tests.parity.pool import Pool


@pytest.fixture(scope="package")
def pool():
    pool = Pool(4)
    yield pool
    pool.close()
