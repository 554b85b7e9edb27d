from __future__ import annotations

from tests.conftest import Made, untouched


def test_x(pooling: Made) -> None:
    with untouched(pooling[0]):
        assert True
