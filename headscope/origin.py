"""Provenance of results."""

from collections.abc import Mapping
from typing import Any

from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.table import Provenance, versions

_WEIGHTS = "weights alone"
_ROWS = "streamed rows, fp32"


def origin(
    model: HeadModel,
    probe: Probe | None = None,
    *,
    attention: str = _ROWS,
    control: str | None = None,
    seed: int | None = None,
    checks: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Provenance:
    """Build the provenance of a result.

    Args:
        model: the model that was run or read.
        probe: the probe that was run; None if there was none.
        attention: how the rows were computed.
        control: name of the null.
        seed: default: the probe's.
        checks: measurements that validate an intervention.
        facts: JSON values that join the probe's settings.
    """
    about: dict[str, Any] = {}
    if probe is not None:
        about = {"kind": probe.name, "examples": len(probe), **probe.settings}
        about |= _extrapolated(model, probe)
    return Provenance(
        model=model.name,
        revision=model.revision,
        weight_digest=model.digest(),
        path=model.path,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        probe=about | facts,
        control=control,
        seed=probe.seed if probe is not None and seed is None else seed,
        versions=versions(),
        attention=attention,
        checks=checks or {},
    )


def of_weights(model: HeadModel, **facts: Any) -> Provenance:
    """Build the provenance of a result that was computed from weights alone."""
    return origin(model, attention=_WEIGHTS, **held_norm(model), **facts)


def held_norm(model: HeadModel) -> dict[str, Any]:
    """Provenance note about a norm between the heads and the residual stream."""
    if "linear_write" not in model.limits:
        return {}
    return {"write": "through the norm after attention, its gain folded and its scale held fixed"}


def _extrapolated(model: HeadModel, probe: Probe) -> dict[str, int]:
    """Provenance note that the probe is longer than the trained context; empty otherwise."""
    trained = model.shape.trained_ctx
    beyond = trained is not None and int(probe.real.sum(1).max()) > trained
    return {"extrapolated_from": trained} if trained is not None and beyond else {}
