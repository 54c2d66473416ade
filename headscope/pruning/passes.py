"""Batches for forward and backward passes: nothing is recorded for replay."""

from collections.abc import Iterator

from headscope.ablation.engine import Batch
from headscope.ablation.run import Study
from headscope.ablation.sources import ForwardSource


def whole_batches(study: Study) -> Iterator[Batch]:
    """Batches of a study's probe, in order, each ready for whole passes."""
    for start in range(0, len(study.probe), study.size):
        part = study.probe.examples(slice(start, min(start + study.size, len(study.probe))))
        read = study.metric.reads(part)
        source = ForwardSource(study.model, part.tokens, part.real, read)
        yield Batch(part, study.metric, source, read, study.limit)
