"""Where a reading came from."""

from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.table import Provenance, versions


def provenance(
    model: HeadModel, kind: str, probe: Probe | None = None, **settings: object
) -> Provenance:
    """Facts of one reading or attribution."""
    facts = {"kind": kind, **settings}
    if probe is not None:
        facts |= {"probe": probe.name, "examples": len(probe), **probe.settings}
    return Provenance(
        model=model.name,
        revision=model.revision,
        weight_digest=model.digest(),
        path=model.path,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        probe=facts,
        seed=None if probe is None else probe.seed,
        versions=versions(),
    )
