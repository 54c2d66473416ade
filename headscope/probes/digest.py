"""Which data a probe holds."""

import hashlib

from headscope.probes.probe import Probe


def probe_digest(*probes: Probe | None) -> str:
    """SHA-256 over all that edits and metrics may read of some probes."""
    digest = hashlib.sha256()
    for probe in probes:
        if probe is None:
            digest.update(b"none")
            continue
        tensors = {"tokens": probe.tokens, "real": probe.real, "targets": probe.targets}
        tensors |= {} if probe.foils is None else {"foils": probe.foils}
        tensors |= {f"mark {name}": mark for name, mark in sorted(probe.marks.items())}
        for name, value in tensors.items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        digest.update(probe_digest(probe.corrupt).encode() if probe.corrupt is not None else b"-")
    return digest.hexdigest()
