"""How hard to try: a few seconds in ``make test``, thousands with HEADSCOPE_FUZZ=2000."""

import os

from hypothesis import HealthCheck, Phase, settings

ASKED = int(os.environ.get("HEADSCOPE_FUZZ", "0"))


def effort(quick: int) -> settings:
    """Settings with ``quick`` fixed examples, or as many random ones as were asked for."""
    return settings(
        max_examples=ASKED or quick,
        derandomize=not ASKED,
        database=None,
        deadline=None,
        # No shrinking: the inputs are small as drawn, and each try may be a whole run.
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
