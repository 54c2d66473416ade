"""Models as sequences of mixers: inputs and outputs of each block, with or without attention.

State-space models have no attention rows, but like every block they read the residual stream and
add to it. That is enough to ask what is stored where.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.models.hf.hooks import Hook, entering, hooked, leaving
from headscope.models.running import pass_over

MIXER_SITES = ("resid_pre", "mixer_out", "mlp_out", "resid_post")
# What families call the part of a block that moves information between positions, and the other.
_MIXERS = (
    "mixer", "self_attn", "attn", "attention", "self_attention", "mamba", "linear_attn", "conv",
    "temporal_block", "time_mixer", "operator",
)  # fmt: skip
_MLPS = ("mlp", "feed_forward", "block_sparse_moe", "mlp_block", "moe")
Place = tuple[str, int]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class MixerModel:
    """A transformers language model as a sequence of blocks.

    Attributes:
        name: of the model.
        module: the model.
        blocks: in order.
    """

    name: str
    module: nn.Module
    blocks: tuple[nn.Module, ...]

    @classmethod
    def of(cls, module: Any, name: str | None = None) -> "MixerModel":
        """Find the blocks of a model.

        Raises:
            UnsupportedModelError: if there is not one row of blocks.
        """
        title = name or type(module).__name__
        count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
        rows = [
            tuple(part)
            for part in module.modules()
            if isinstance(part, nn.ModuleList) and len(part) == count
        ]
        rows = [row for row in rows if all(_named(block, _MIXERS) is not None for block in row)]
        if len(rows) != 1:
            raise UnsupportedModelError(
                f"{title}: no single row of {count} blocks with a mixer each was found, so what "
                "enters and leaves its mixers cannot be told."
            )
        return cls(title, module, rows[0])

    def places(self) -> list[Place]:
        """Sites and layers that can be read and written."""
        found = []
        for site in MIXER_SITES:
            for layer, block in enumerate(self.blocks):
                if site != "mlp_out" or _named(block, _MLPS) is not None:
                    found.append((site, layer))
        return found

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        reads: Mapping[Place, Callable[[Tensor], Any]] | None = None,
        writes: Mapping[Place, Change] | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a pass with values at some places read or changed."""
        hooks = [
            _hook(self._module(place), place[0], _reader(read))
            for place, read in (reads or {}).items()
        ]
        hooks += [
            _hook(self._module(place), place[0], change) for place, change in (writes or {}).items()
        ]
        device = next(self.module.parameters()).device
        with self._pass(hooks):
            output: Any = self.module(input_ids=tokens.to(device), use_cache=False)
        logits: Tensor = output.logits
        return logits.float()

    @contextmanager
    def _pass(self, hooks: list[Hook]) -> Iterator[None]:
        with torch.no_grad(), pass_over(self.module), hooked(hooks):
            yield

    def _module(self, place: Place) -> nn.Module:
        site, layer = place
        block = self.blocks[layer]
        if site in ("resid_pre", "resid_post"):
            return block
        found = _named(block, _MIXERS if site == "mixer_out" else _MLPS)
        assert found is not None  # noqa: S101  # places() names no other
        return found


def _named(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The one part of a block that has such a name; None where none or several have."""
    found = [part for name, part in block.named_children() if name in names]
    return found[0] if len(found) == 1 else None


def _reader(read: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor | None]:
    def act(value: Tensor) -> None:
        read(value)

    return act


def _hook(module: nn.Module, site: str, act: Callable[[Tensor], Tensor | None]) -> Hook:
    return entering(module, act) if site == "resid_pre" else leaving(module, act)
