import pytest

from tests.models.every_family import holds, share


@pytest.mark.parametrize("kind", share(2))
def test_right_limited_or_refused(kind: str) -> None:
    holds(kind)
