"""Small sweeps on the bundled model."""

from typing import Any

from headscope.sweeps import SweepConfig
from headscope.sweeps.reading import check_config

REPEATED = {"kind": "repeated_tokens", "length": 6, "batch": 3}


def config(**changes: Any) -> SweepConfig:
    """Twelve heads by themselves, zeroed, in chunks of four."""
    wanted: dict[str, Any] = {
        "name": "test",
        "models": ["tiny-gpt2"],
        "probes": [REPEATED],
        "edits": ["zero"],
        "metrics": ["loss"],
        "chunk": 4,
    }
    made = SweepConfig.model_validate(wanted | changes)
    check_config(made)
    return made
