"""Small sweeps on the bundled model."""

from typing import Any

import pytest

from headscope.ablation.engine import RecordedBatch
from headscope.sweeps import SweepConfig
from headscope.sweeps.config import check_config

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


def variants_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of variants of every batch that is run from now on."""
    run: list[int] = []
    values = RecordedBatch.all_values

    def counting(self: RecordedBatch, variants: Any, *more: Any) -> Any:
        run.append(len(variants))
        return values(self, variants, *more)

    monkeypatch.setattr(RecordedBatch, "all_values", counting)
    return run
