"""DeCoRe: a model contrasted with itself without its retrieval heads, token by token."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.options import RunOptions
from headscope.edits import Heads, Scope
from headscope.errors import InputError
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.retrieval.generation import (
    Chooser,
    Generated,
    Mask,
    Masking,
    Mixed,
    Prompts,
    Text,
    write,
)

Alpha = Literal["entropy", "gain"] | int | float
# Largest weight that an entropy gives, and the share of the likeliest token's probability below
# which a token is not chosen (Li et al. 2022, arXiv 2210.15097: 0.1).
MOST = 1.0
PLAUSIBLE = 0.1


@dataclass(frozen=True)
class Contrast:
    """Scores ``(1 + alpha) log p_base - alpha log p_masked`` (Gema et al. 2024, section 2).

    An entropy of several nats weighs the difference so much that tokens win which both models hold
    impossible. So by default an entropy counts as 1 at most, and tokens that the base model gives
    less than a tenth of the likeliest one's probability are out: the plausibility constraint of
    contrastive decoding (Li et al. 2022, arXiv 2210.15097, section 3.3). The source of DeCoRe has
    neither; :meth:`published` is its setting.

    Attributes:
        alpha: a number >= 0 for all steps (0.5 in the source); ``entropy``: that of the base
            model's next token, in nats; ``gain``: how much masking adds to it, at least 0.
        most: largest alpha that ``entropy`` and ``gain`` give; None: no limit. A number given as
            alpha is taken as it is.
        share: divide an entropy by that of the flat distribution, so that it is at most 1.
        plausible: tokens with ``p_base < plausible * max(p_base)`` are left out (score -inf); from
            0, which leaves out none, to 1, which leaves the base model's choice.

    Example:
        >>> base, masked = torch.zeros(1, 4), torch.eye(4)[:1]
        >>> Contrast(0.5)(base, masked).scores.argmin().item()  # what masking makes likelier
        0
    """

    alpha: Alpha = "entropy"
    most: int | float | None = MOST
    share: bool = False
    plausible: int | float = PLAUSIBLE

    @classmethod
    def published(cls, alpha: Alpha = "entropy") -> "Contrast":
        """As in Gema et al. 2024: no largest alpha, and every token may be chosen.

        Example:
            >>> Contrast.published().most is None
            True
        """
        return cls(alpha, most=None, plausible=0.0)

    def __post_init__(self) -> None:
        """Check alpha and its limits."""
        if isinstance(self.alpha, str):
            if self.alpha not in ("entropy", "gain"):
                raise InputError(f"alpha={self.alpha!r} is unknown: 'entropy', 'gain' or a number.")
        elif not 0 <= self.alpha < float("inf"):
            raise InputError(f"alpha={self.alpha} must be 0 or more.")
        if self.most is not None and self.most < 0:
            raise InputError(f"most={self.most} must be 0 or more.")
        if not 0 <= self.plausible <= 1:
            raise InputError(f"plausible={self.plausible} is a share of a probability: 0 to 1.")

    def __call__(
        self, base: Float[Tensor, "batch d_vocab"], masked: Float[Tensor, "batch d_vocab"]
    ) -> Mixed:
        """Mix the logits of both runs."""
        own, other = base.float().log_softmax(1), masked.float().log_softmax(1)
        alpha = self._weight(own, other)
        scores = own + alpha[:, None] * (own - other)
        out = own.isneginf()
        if self.plausible:
            out = out | (own < own.amax(1, keepdim=True) + math.log(self.plausible))
        return Mixed(scores.masked_fill(out, -torch.inf), alpha)

    def _weight(self, own: Tensor, other: Tensor) -> Float[Tensor, " batch"]:
        if not isinstance(self.alpha, str):
            return torch.full((len(own),), float(self.alpha), device=own.device)
        weight = _entropy(own)
        if self.alpha == "gain":
            weight = (_entropy(other) - weight).clamp_min(0)
        if self.share:
            weight = weight / math.log(own.shape[1])
        return weight if self.most is None else weight.clamp_max(float(self.most))


def _entropy(log_probabilities: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
    """In nats."""
    entropy: Tensor = torch.special.entr(log_probabilities.exp()).sum(1)
    return entropy


@own_types()
def decore(
    model: HeadModel,
    prompts: Prompts,
    heads: Heads,
    alpha: Alpha = "entropy",
    *,
    most: int | float | None = MOST,
    share: bool = False,
    plausible: int | float = PLAUSIBLE,
    method: Masking = "uniform",
    scope: Scope = "decode",
    new_tokens: int = 20,
    temperature: int | float = 0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Generated:
    """Generate by contrasting retrieval heads (DeCoRe, Gema et al. 2024, arXiv 2410.18860).

    Two runs read the same text, one with the heads masked; each keeps its keys and values. The
    next token is taken from ``(1 + alpha) log p_base - alpha log p_masked``, with ``alpha`` the
    entropy of ``p_base``, at most 1: where the model is unsure, what its retrieval heads add counts
    more. Only tokens with at least a tenth of the likeliest one's probability can be chosen, as in
    contrastive decoding (Li et al. 2022). The source has no such limits: ``most=None,
    plausible=0`` is its setting, with which small models and large vocabularies, whose entropies
    are several nats, write nonsense.
    With ``alpha=0`` the base model writes by itself. About twice the time of plain generation.

    Args:
        model: from :func:`headscope.load`.
        prompts: as :func:`headscope.retrieval.generate` takes them.
        heads: to be masked, e.g. ``retrieval.heads()``.
        alpha: see :class:`headscope.retrieval.Contrast`, as for the next three.
        most: largest alpha that an entropy gives; None: no limit, as in the source.
        share: divide an entropy by that of the flat distribution.
        plausible: least share of the likeliest token's probability; 0: none, as in the source.
        method: how heads are masked; ``uniform`` in the source.
        scope: where; ``decode`` in the source.
        new_tokens: at most.
        temperature: 0: the highest score; else drawn from ``softmax(scores / t)``.
        seed: of the draws.
        batch_size: prompts at a time.
        progress: show a bar.

    Returns:
        What was said, with the alpha of every step.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> prompt = "The code of the red door is seven. The code of the red door is"
        >>> said = decore(model, prompt, ["L2H0", "L2H1"], new_tokens=2)
        >>> len(said.alphas[0])
        2
    """
    contrast = Contrast(alpha, most, share, plausible)
    return write(
        model,
        prompts,
        [None, Mask.of(model, heads, method, scope)],
        lambda runs: contrast(runs[0], runs[1]),
        new_tokens=new_tokens,
        chooser=Chooser(float(temperature), seed),
        options=RunOptions(batch_size, seed=seed, progress=progress),
    )


@dataclass
class DeCoReProcessor:
    """The same as a logits processor of transformers' ``generate``, greedy or sampled.

    transformers runs the base model, with its own cache; this runs the masked one beside it, with
    another. Prompts are those of the first call, padded on the left or not at all; a new prompt
    begins anew. Beams work, but read the text again whenever they change places.

    Attributes:
        model: from :func:`headscope.load`; call ``generate`` of ``model.module``.
        heads: to be masked.
        contrast: of both runs.
        real: of the prompts, False at padding; default: none is padded.
        method: how heads are masked.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> processor = DeCoReProcessor(model, ["L2H0"])
        >>> ids = hs.probes.repeated_tokens(model, length=8, batch=2).tokens
        >>> out = model.module.generate(
        ...     ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0,
        ...     logits_processor=[processor],
        ... )
        >>> out.shape[1] - ids.shape[1]
        2
    """

    model: HeadModel
    heads: Heads
    contrast: Contrast = field(default_factory=Contrast)
    real: Bool[Tensor, "batch pos"] | None = None
    method: Masking = "uniform"
    _mask: Mask = field(init=False)
    _text: Text | None = field(init=False, default=None)
    _read: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Check the heads."""
        self._mask = Mask.of(self.model, self.heads, self.method)

    def __call__(
        self, input_ids: Int[Tensor, "batch pos"], scores: Float[Tensor, "batch d_vocab"]
    ) -> Float[Tensor, "batch d_vocab"]:
        """Scores of the next token from the base model's, and the masked model's own."""
        masked = self._masked(input_ids.cpu()).to(scores.device)
        return self.contrast(scores, masked).scores.to(scores.dtype)

    def _masked(self, ids: Tensor) -> Tensor:
        known = self._read
        self._read = ids.clone()
        if known is not None and self._text is not None and ids.shape[1] == known.shape[1] + 1:
            if torch.equal(ids[:, :-1], known):
                return self._text.read(ids[:, -1:])
            prompt = self._text.real.shape[1]  # beams changed places
            self._text = Text(self.model, self._text.real, self._mask)
            self._text.prompt(ids[:, :prompt])
            return self._text.read(ids[:, prompt:])
        real = torch.ones_like(ids, dtype=torch.bool)
        if self.real is not None:
            if len(ids) % len(self.real) or self.real.shape[1] != ids.shape[1]:
                raise InputError(
                    f"real has shape {tuple(self.real.shape)}, the prompts {tuple(ids.shape)}."
                )
            real = self.real.repeat_interleave(len(ids) // len(self.real), 0)
        self._text = Text(self.model, real, self._mask)
        return self._text.prompt(ids)
