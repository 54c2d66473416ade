"""``headscope patch``: where a pair of texts differ inside the model, by layer and position."""

import time
from pathlib import Path
from typing import Any

from headscope import metrics, probes
from headscope.ablation import patch_stream
from headscope.ablation.stream import STREAM_SITES
from headscope.base.files import FolderClaim
from headscope.cli.options import Loading
from headscope.cli.output import asked_of, print_result, print_written, typed
from headscope.errors import InputError, nearest
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.table import EffectGrid, versions

_DIRECTIONS = ("noise", "denoise")


def run(
    loading: Loading,
    *,
    site: str,
    task: str,
    pairs: Path | None,
    examples: int,
    seed: int,
    direction: str,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Load, patch, write, print."""
    if site not in STREAM_SITES:
        raise InputError(nearest(site, STREAM_SITES, kind="site of the residual stream"))
    if direction not in _DIRECTIONS:
        raise InputError(nearest(direction, _DIRECTIONS, kind="direction"))
    if overwrite and out is None:
        raise InputError("--overwrite needs --out: without it nothing is written.")
    claim = None if out is None else FolderClaim.create(out, "patch", overwrite=overwrite)
    started = time.perf_counter()
    model = loading.model()
    asked: dict[str, Any] = {"site": site, "direction": direction}
    asked |= {"task": task, "examples": examples, "seed": seed} if pairs is None else {}
    asked |= {} if pairs is None else {"pairs": pairs.name}
    if claim is not None:
        claim = claim.of(asked_of(model, loading, **asked))
    probe = _probe(model, task, pairs, examples, seed)
    grid = patch_stream(model, probe, metrics.logit_difference, site, direction=direction)
    if claim is not None:
        settings = {"command": "patch", "model": model.name, "revision": model.revision, **asked}
        _write(claim.ready(), grid, settings, time.perf_counter() - started)
    print_result(grid, as_json=as_json)
    if claim is not None:
        files = ("effects.safetensors", "effects.parquet", "pictures/")
        print_written(claim.path, *files, page=False)


def _probe(model: HeadModel, task: str, pairs: Path | None, examples: int, seed: int) -> Probe:
    """Pairs of a known task, or of a file.

    Raises:
        InputError: if the file has no pairs with an answer and a foil.
    """
    if pairs is None:
        return probes.pairs(model, task, batch=examples, seed=seed)
    probe = probes.from_jsonl(model, pairs)
    if probe.corrupt is None or probe.foils is None:
        raise InputError(
            f"{pairs} has no pairs: give every line clean, corrupt, answer and foil, as "
            "hs.probes.from_jsonl says."
        )
    return probe


def _write(claim: FolderClaim, grid: EffectGrid, settings: dict[str, Any], seconds: float) -> None:
    """The grid as numbers, as a table and as pictures of effects and of their share."""
    from importlib.util import find_spec

    from headscope.base.files import subfolder, whole_file
    from headscope.plots import heatmap, save

    grid.save(claim.path / "effects.safetensors")
    with whole_file(claim.path / "effects.parquet") as file:
        grid.to_pandas().to_parquet(file, index=False)
    kind = "png" if find_spec("matplotlib") else "html"
    save(heatmap(grid), subfolder(claim.path, "pictures") / f"effects.{kind}")
    claim.write_facts(
        {
            "command": typed(),
            "settings": settings,
            "versions": versions(),
            "timings": {"seconds": seconds},
        }
    )
