"""Metric values of ablated heads, kept on the disk as they are finished."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from headscope.ablation.arguments import Maker, Positions, seed_of
from headscope.errors import InputError
from headscope.files import check_same, whole_file, writable_folder
from headscope.heads import HeadIndex
from headscope.interventions import Intervention
from headscope.metrics import AnyMetric, Metric
from headscope.probes.probe import Probe, probe_digest
from headscope.table import Provenance

Checkpoint = str | PathLike[str] | None

# A finished head that is measured again may differ by this, beside its own size.
_AGREEMENT = 1e-4
_HALF_AGREEMENT = 5e-2


class KeptEffects:
    """The metric with each of some heads ablated, one value per head and example.

    The file keeps the heads of earlier calls with the same facts, whether they are asked for now
    or not.

    Args:
        file: safetensors, replaced whole whenever heads are finished.
        facts: JSON values that decide the numbers: a file with others is refused.
        heads: that are measured now, in the order of the variants.
        examples: how many the probe has.

    Raises:
        InputError: if the file is of another measurement, cannot be read or not be written.
    """

    def __init__(
        self, file: Path, facts: Mapping[str, Any], heads: Sequence[HeadIndex], examples: int
    ) -> None:
        writable_folder(file.parent)
        self._file, self._facts, self._asked = file, json.loads(json.dumps(facts)), len(heads)
        earlier = self._read()
        self._heads = list(dict.fromkeys([*map(str, heads), *earlier]))
        self._values = np.full((len(self._heads), examples), np.nan)
        self._finished = np.zeros(self._values.shape, dtype=np.bool_)
        for head, (values, finished) in earlier.items():
            row = self._heads.index(head)
            self._values[row], self._finished[row] = values, finished
        self._proved = False

    def left(self, chosen: slice) -> list[int]:
        """Variants that are not finished on every example of a batch."""
        finished = self._finished[: self._asked, chosen].all(1)
        return [int(number) for number in np.flatnonzero(~finished)]

    def values(self, chosen: slice) -> Float[np.ndarray, "variant example"]:
        """Values of all variants on the examples of a batch; NaN where they are not finished."""
        return self._values[: self._asked, chosen]

    def keep(
        self, chosen: slice, variants: Sequence[int], values: Float[Tensor, "variant example"]
    ) -> None:
        """Take finished variants of a batch, and write the file."""
        rows = np.asarray(variants)
        self._values[rows, chosen] = values.numpy()
        self._finished[rows, chosen] = True
        self._write()

    def prove(self, chosen: slice, measure: Callable[[int], Float[Tensor, "1 example"]]) -> None:
        """Measure one finished variant again, once a call: the one farthest from the others.

        The facts tell named methods and metrics apart, but not functions of one name, nor a model
        that runs differently on the same weights.

        Raises:
            InputError: if it gives other values now.
        """
        finished = sorted(set(range(self._asked)) - set(self.left(chosen)))
        if self._proved or not finished:
            return
        self._proved = True
        values = self.values(chosen)[finished]
        distance = np.abs(np.nan_to_num(values - np.median(values, axis=0))).sum(1)
        at = finished[int(distance.argmax())]
        now, kept = measure(at)[0].numpy(), self.values(chosen)[at]
        whole = self._facts["dtype"] in ("float32", "float64")
        allowed = _AGREEMENT if whole else _HALF_AGREEMENT
        if not np.allclose(now, kept, rtol=allowed, atol=allowed, equal_nan=True):
            raise InputError(
                f"{self._file} is of another ablation (its values of {self._heads[at]} are up to "
                f"{np.nanmax(np.abs(now - kept)):.2g} from what is measured now): give another "
                "name, or delete it."
            )

    def _read(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Values and what of them is finished, by head; empty if there is no file."""
        from safetensors import SafetensorError, safe_open

        if not self._file.exists():
            return {}
        try:
            with safe_open(self._file, "np") as file:
                told = file.metadata() or {}
                facts, heads = dict(json.loads(told["facts"])), list(json.loads(told["heads"]))
                values, finished = file.get_tensor("values"), file.get_tensor("finished")
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{self._file} is no checkpoint of an ablation: give another name, or delete it."
            ) from error
        check_same(self._file, facts, self._facts, "ablation")
        rows = zip(values, finished.astype(np.bool_), strict=True)
        return dict(zip(heads, rows, strict=True))

    def _write(self) -> None:
        from safetensors.numpy import save

        told = {"facts": json.dumps(self._facts), "heads": json.dumps(self._heads)}
        tensors = {"values": self._values, "finished": self._finished.astype(np.uint8)}
        with whole_file(self._file) as file:
            file.write(save(tensors, told))


def deciding(
    about: Provenance,
    probe: Probe,
    reference: Probe | None,
    metric: AnyMetric,
    method: Maker,
    positions: Positions,
) -> dict[str, Any]:
    """What the value of one ablated head depends on: weights, data, metric, method and seed."""
    where: Any = positions
    if isinstance(positions, Tensor):
        where = hashlib.sha256(positions.bool().cpu().contiguous().numpy().tobytes()).hexdigest()
    return {
        "weights": about.weight_digest,
        "dtype": about.dtype,
        "data": probe_digest(probe, getattr(method, "reference", reference)),
        "metric": metric.name,
        "mark": metric.mark if isinstance(metric, Metric) else None,
        **_said_of(method),
        "positions": where,
        "seed": seed_of(method, about.seed or 0),
    }


def _said_of(method: Maker) -> dict[str, Any]:
    """Name of what heads are ablated to, with an intervention's numbers."""
    if isinstance(method, Intervention):
        return {**method.facts}
    return {"method": method if isinstance(method, str) else getattr(method, "__name__", "edit")}
