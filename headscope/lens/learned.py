"""Learned lenses as results: how good they are on held-out text, and their files on disk."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.base.configs import Strict, parse
from headscope.base.files import whole_file, writable_folder
from headscope.base.saved import frozen
from headscope.base.statistics import mean_and_sem
from headscope.errors import InputError

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class FitReport:
    """Held-out loss of a learned lens and of the plain one, per place and example.

    Attributes:
        rows: places that the lens reads.
        learned: ``KL(model || learned lens)`` in nats, mean over an example's tokens.
        plain: the same of the plain lens.
        agreement: share of tokens whose most likely token is the model's own, learned and plain.
        tokens: held out.
        fitted: tokens that the lens was fitted to.

    Example:
        >>> report = hs.lens.tuned_lens(model, probe, steps=1).report
        >>> report.rows[0], report.gain.shape == (model.shape.n_layers,)
        ('embedding', True)
    """

    rows: tuple[str, ...]
    learned: Float[np.ndarray, "row example"]
    plain: Float[np.ndarray, "row example"]
    agreement: Float[np.ndarray, "2 row"]
    tokens: int
    fitted: int

    def __post_init__(self) -> None:
        """Freeze the arrays."""
        for name in ("learned", "plain", "agreement"):
            object.__setattr__(self, name, frozen(getattr(self, name), np.float64))

    @property
    def gain(self) -> Float[np.ndarray, " row"]:
        """Nats that the learned lens saves per token, mean over examples."""
        return np.asarray((self.plain - self.learned).mean(1))

    @property
    def better(self) -> Bool[np.ndarray, " row"]:
        """Where the held-out loss is lower than that of the plain lens."""
        return np.asarray(self.gain > 0)

    def __str__(self) -> str:
        """Say in one line whether learning was worth it."""
        learned, plain = float(self.learned.mean()), float(self.plain.mean())
        where = f"better at {int(self.better.sum())} of {len(self.rows)} places"
        text = f"held-out KL {learned:.3g} nats, plain lens {plain:.3g}, {where}"
        return text if learned < plain else f"NO BETTER than the plain lens: {text}"

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per place: both losses, what is saved with its standard error, agreement."""
        import pandas

        return pandas.DataFrame(
            {
                "row": self.rows,
                "learned_kl": self.learned.mean(1),
                "plain_kl": self.plain.mean(1),
                "saved": self.gain,
                "saved_sem": mean_and_sem(self.plain - self.learned).sem,
                "learned_agreement": self.agreement[0],
                "plain_agreement": self.agreement[1],
                "better": self.better,
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "rows": list(self.rows),
            "learned": self.learned.tolist(),
            "plain": self.plain.tolist(),
            "agreement": self.agreement.tolist(),
            "tokens": self.tokens,
            "fitted": self.fitted,
        }

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "FitReport":
        """Read what :meth:`to_json` wrote."""
        arrays = {
            name: np.array(facts[name], dtype=float) for name in ("learned", "plain", "agreement")
        }
        return cls(
            rows=tuple(str(one) for one in facts["rows"]),
            tokens=int(facts["tokens"]),
            fitted=int(facts["fitted"]),
            **arrays,
        )


_WEIGHTS, _CONFIG = "lens.safetensors", "config.json"
_MOST = 2**24  # bytes of a config


class Saved(Strict):
    """What ``config.json`` says of a lens."""

    kind: str
    model: str
    digest: str
    settings: dict[str, Any]
    report: dict[str, Any]
    format: int = 1


def save_lens(folder: "str | PathLike[str]", tensors: Mapping[str, Tensor], facts: Saved) -> None:
    """Write weights, then config: a folder with a config is complete."""
    from safetensors.torch import save

    place = writable_folder(Path(folder))
    (place / _CONFIG).unlink(missing_ok=True)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with whole_file(place / _WEIGHTS) as file:
        file.write(save(plain))
    with whole_file(place / _CONFIG) as file:
        file.write(json.dumps(facts.model_dump(), indent=2, allow_nan=False).encode() + b"\n")


def load_lens(folder: "str | PathLike[str]") -> tuple[dict[str, Tensor], Saved]:
    """Read what :func:`save_lens` wrote.

    Raises:
        InputError: if it is not there, not whole, or not what it says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    place = Path(folder)
    try:
        if (place / _CONFIG).stat().st_size > _MOST:
            raise InputError(f"{place / _CONFIG} is larger than such a file can be.")
        facts = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = load((place / _WEIGHTS).read_bytes())
    except OSError as error:
        raise InputError(
            f"{folder} holds no saved lens ({_CONFIG} and {_WEIGHTS}): {error.strerror}."
        ) from error
    except (ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"the lens in {folder} cannot be read: {error}.") from error
    if not isinstance(facts, dict):
        raise InputError(f"{place / _CONFIG} does not hold a lens.")
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{name} of the lens in {folder} is not finite.")
    return tensors, parse(Saved, facts, str(place / _CONFIG))
