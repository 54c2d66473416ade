"""Where a retrieval score came from."""

from typing import Any

from headscope.capture import extrapolated
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.table import Provenance
from headscope.table.provenance import versions


def origin(model: HeadModel, probe: Probe, **settings: Any) -> Provenance:
    """Provenance of scores of a probe; ``settings`` join those of the probe."""
    return Provenance(
        model=model.name,
        revision=model.revision,
        weight_digest=model.digest(),
        path=model.path,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        probe={
            "kind": probe.name,
            "examples": len(probe),
            **probe.settings,
            **extrapolated(model, probe),
            **settings,
        },
        control=str(probe.settings.get("control")) if probe.control is not None else None,
        seed=probe.seed,
        versions=versions(),
    )
