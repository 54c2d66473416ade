"""Verification at load that headscope reads and writes the model's real heads.

In the comparisons that decide, NaN never agrees, and tolerances follow dtype, length and scores.
"""

import hashlib
import json
import math
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headscope.base.files import cache_folder, whole_file
from headscope.base.specs import versions
from headscope.errors import HeadscopeError, UnsupportedModelError
from headscope.models.running import pass_over

if TYPE_CHECKING:
    from headscope.models.bridge.model import BridgeModel
    from headscope.models.hf.model import HFModel
    from headscope.models.hf.seq2seq import Seq2SeqModel
    from headscope.views import Unembedding


# Rounding between two computations of one number, in units of epsilon: for the number itself, times
# the root of the number of terms in a sum, and times the size of an attention score (a score ``s``
# has the error ``eps * s``, and its weight in a row that relative error). Sums in half precision
# are accumulated in fp32 and rounded once.
_SINGLE, _HALF = (32.0, 2.0, 4.0), (8.0, 0.25, 0.5)
# Largest allowance for cancellation between a logit's terms.
_CANCELLED = 30.0


@dataclass(frozen=True)
class Gap:
    """Difference of two values that should be equal, with its tolerance.

    Attributes:
        size: largest difference, relative to the largest expected number; NaN if either side
            contains NaN.
        allowed: largest size that rounding can explain.
    """

    size: float
    allowed: float

    @property
    def closed(self) -> bool:
        """Whether the difference is within the tolerance; False for NaN.

        Example:
            >>> Gap(float("nan"), 1.0).closed
            False
        """
        return self.size <= self.allowed


def gap(actual: Tensor, expected: Tensor, allowed: float) -> Gap:
    """Compare two tensors of the same shape.

    Args:
        actual: tensor of any shape.
        expected: tensor of the same shape; NaN on either side makes the gap NaN.
        allowed: largest difference, relative to the largest ``expected`` number.

    Example:
        >>> gap(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 1e-6).closed
        True
    """
    if actual.shape != expected.shape:
        return Gap(math.inf, allowed)
    if expected.numel() == 0:
        return Gap(math.nan, allowed)  # nothing was compared, so nothing is proved
    exact = torch.promote_types(expected.dtype, torch.float32)  # not every device has float64
    a, e = actual.detach().to(expected.device, exact), expected.detach().to(exact)
    least = float(torch.finfo(torch.float32).tiny)
    return Gap(float((a - e).abs().max() / e.abs().max().clamp_min(least)), allowed)


def rounding(dtype: torch.dtype, terms: int = 1, score: float = 0.0) -> float:
    """Largest relative difference that rounding can cause between two computations of a sum.

    Args:
        dtype: dtype of the computation.
        terms: number of terms; errors grow with its square root.
        score: size of the largest attention score involved.

    Returns:
        A relative tolerance of at most 0.5, since larger differences are not rounding in any dtype.

    Example:
        >>> rounding(torch.float32, terms=64) < 1e-4 < rounding(torch.bfloat16) <= 0.5
        True
    """
    # fp64 models still compute rotations, norms and softmax in fp32.
    computed = torch.float32 if dtype == torch.float64 else dtype
    itself, by_term, by_score = _SINGLE if computed == torch.float32 else _HALF
    size = itself + by_term * math.sqrt(terms) + by_score * score
    return min(0.5, torch.finfo(computed).eps * size)


def logit_gap(
    unembedding: "Unembedding",
    residual: Float[Tensor, "batch pos d_model"],
    logits: Float[Tensor, "batch *place d_vocab"],
    allowed: float,
) -> Gap:
    """Compare logits from final norm and unembedding with the model's own.

    If terms of a logit cancel and exceed the largest logit, the tolerance grows accordingly. This
    happens in models with a large constant in the residual stream.

    Args:
        unembedding: final norm and unembedding of the model.
        residual: input of the final norm.
        logits: the model's own logits; ``[batch d_vocab]`` for only the first position.
        allowed: as in :func:`gap`, for logits whose terms do not cancel.
    """
    found = unembedding.logits(residual)
    found = found[:, 0] if logits.ndim == 2 else found
    plain = gap(found, logits, allowed)
    if plain.closed:
        return plain
    words = unembedding.W_U.float().abs().T * abs(unembedding.logit_scale)
    terms = float((unembedding.normed(residual).abs() @ words).max())
    cancelled = terms / max(float(logits.abs().max()), torch.finfo(torch.float32).tiny)
    return Gap(plain.size, allowed * min(max(1.0, cancelled), _CANCELLED))


@dataclass(frozen=True)
class LoadCheck:
    """One check made when a model is loaded.

    Attributes:
        what: short description of what should be equal.
        gap: measured difference.
        costs: capabilities lost on failure, as keys of ``model.limits``; empty: the model is
            refused.
        reason: what a failure means and what to do, as the end of a sentence.
    """

    what: str
    gap: Gap
    costs: tuple[str, ...] = ()
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the two sides agree."""
        return self.gap.closed


@dataclass(frozen=True)
class Proof:
    """All checks made when a model was loaded; empty if checking was disabled.

    Attributes:
        tokens: length of the text that was used; for an image, its number of positions.
        checks: worst check of each kind over all layers.
        facts: other observations, as sentences.
        limits: capabilities lost to failed checks, with reasons.
        remembered: whether it was made by an earlier run, of the same weights, code and device.
    """

    tokens: int = 0
    checks: tuple[LoadCheck, ...] = ()
    facts: tuple[str, ...] = ()
    limits: dict[str, str] = field(default_factory=dict)
    remembered: bool = False

    def to_json(self) -> dict[str, Any]:
        """The proof as JSON values; numbers exactly, infinite ones and NaN too."""
        return {
            "tokens": self.tokens,
            "checks": [
                [one.what, one.gap.size.hex(), one.gap.allowed.hex(), list(one.costs), one.reason]
                for one in self.checks
            ],
            "facts": list(self.facts),
            "limits": self.limits,
        }

    @classmethod
    def from_json(cls, found: Any) -> "Proof":
        """A proof from :meth:`to_json`.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: if it is something else.
        """
        checks = tuple(
            LoadCheck(
                str(what),
                Gap(float.fromhex(size), float.fromhex(allowed)),
                tuple(map(str, costs)),
                str(reason),
            )
            for what, size, allowed, costs, reason in found["checks"]
        )
        facts = tuple(map(str, found["facts"]))
        limits = {str(name): str(reason) for name, reason in found["limits"].items()}
        return cls(int(found["tokens"]), checks, facts, limits)


# Proofs in this process, by module, with the state of the weights they apply to.
_PROVED: "WeakKeyDictionary[nn.Module, tuple[object, Proof]]" = WeakKeyDictionary()
# Number of sampled entries per weight that identify a model's state.
_SAMPLED = 64


def prove(model: "HFModel | Seq2SeqModel | BridgeModel", *, remember: bool = False) -> None:
    """Check on a text or an image that headscope's view matches the model.

    The comparisons are stored in ``model.proof``.

    Runs two passes over a text of 64 to 256 tokens, longer than the model's windows if possible:
    the plain model, and the model through headscope. Compares the logits, every layer's output,
    ``rows x values`` with ``z``, ``z @ W_O + bias`` with the output projection's output, final norm
    and unembedding with the logits, and windows with the model's own masks. A failed check removes
    the capability that needs it, with the reason in ``model.limits``; wrong rows refuse the model.
    Each module is checked once per process and state of its weights.

    Args:
        model: model wrapped by headscope.
        remember: for a module that was just read from files: keep the proof in
            :func:`headscope.base.files.cache_folder`, and take it from there where the digest of
            the weights, the config, the device, the code and versions are all the same.

    Raises:
        ModelLoadError: if the model does not run, or its weights are broken.
        UnsupportedModelError: if rows or head outputs differ from the model's.
    """
    module, weights = _key(model)
    known = _PROVED.get(module)
    if known is None or known[0] != weights or (known[1].remembered and not remember):
        with pass_over(module):
            known = (weights, _remembered(model) if remember else _proved(model))
        _PROVED[module] = known
    model.proof = known[1]


def _remembered(model: Any) -> Proof:
    """Proof of an earlier run if there is one; otherwise it is made, and kept."""
    folder = cache_folder()
    if folder is None or not _is_plain(model.module):
        return _proved(model)
    file = folder / "proofs" / f"{_memory_key(model)}.json"
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        return replace(Proof.from_json(json.loads(file.read_bytes())), remembered=True)
    proof = _proved(model)
    with suppress(OSError, HeadscopeError):  # a full or read-only disk costs time, nothing else
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as opened:
            opened.write(json.dumps(proof.to_json(), allow_nan=False).encode())
    return proof


def _is_plain(module: nn.Module) -> bool:
    """Whether weights, config and installed code are all that decides what a module computes.

    Not so with hooks, adapters, quantised or offloaded weights, code that came with the model, and
    replaced methods.
    """
    from headscope.models.hf.hooks import has_hooks
    from headscope.models.hf.transformers_api import has_adapters

    config = getattr(module, "config", None)
    if getattr(config, "quantization_config", None) or getattr(module, "hf_device_map", None):
        return False
    if has_adapters(module) or has_hooks(module):
        return False
    devices = {one.device.type for one in (*module.parameters(), *module.buffers())}
    parts = list(module.modules())
    replaced = any("forward" in vars(one) for one in parts)
    installed = all(_is_installed(kind) for kind in set(map(type, parts)))
    return len(devices) == 1 and "meta" not in devices and installed and not replaced


def _is_installed(kind: type[nn.Module]) -> bool:
    """Whether a class and its ``forward`` are those of torch or transformers."""
    code = getattr(kind.forward, "__code__", None)
    homes = [Path(str(sys.modules[name].__file__)).parent for name in ("torch", "transformers")]
    own = sys.modules.get(kind.__module__)
    files = (getattr(code, "co_filename", None), getattr(own, "__file__", None))
    return all(
        name is not None and any(Path(name).is_relative_to(home) for home in homes)
        for name in files
    )


def _memory_key(model: Any) -> str:
    """Digest of everything that a proof depends on."""
    from headscope.models.hf.transformers_api import attention_name

    module = model.module
    device = next(module.parameters()).device
    there = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    facts = {
        "weights": model.digest(),
        "config": str(module.config),
        "attention": attention_name(module.config),
        "name": model.name,  # its limits are sentences about it
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "seen_as": type(model).__qualname__,
        "device": [device.type, there, torch.get_float32_matmul_precision()],
        "versions": versions(),
        "code": [_own_code(), *_code_of(module)],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _code_of(module: nn.Module) -> Iterator[str]:
    """Digests of the source files that a module's classes are in."""
    for name in sorted({type(one).__module__ for one in module.modules()}):
        file = getattr(sys.modules.get(name), "__file__", None)
        yield name if file is None else f"{name} {_digest_of(Path(file))}"


@cache
def _own_code() -> str:
    """Digest of headscope's sources: during development its version stays the same."""
    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    named = (f"{file.relative_to(package)} {_digest_of(file)}\n" for file in files)
    return hashlib.sha256("".join(named).encode()).hexdigest()


def _digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _proved(model: "HFModel | Seq2SeqModel | BridgeModel") -> Proof:
    from headscope.models.hf.model import HFModel
    from headscope.models.hf.seq2seq import Seq2SeqModel, proof_of

    if isinstance(model, Seq2SeqModel):
        checks, length = proof_of(model)
        return judge(model, length, checks, ())
    if isinstance(model, HFModel):
        from headscope.models.hf import evidence
        from headscope.models.taps import Texts

        batch = evidence.proof_batch(model)
        plain = evidence.plain_pass(model, batch)
        checks, facts = evidence.watched_pass(model, batch, plain)
        length = model.n_queries(Texts.of(batch))
        longer, more = evidence.long_masks(model, length)
        return judge(model, length, [*checks, *longer], (*facts, *more))
    from headscope.models.bridge import evidence as bridge_evidence

    tokens = bridge_evidence.proof_tokens(model)
    checks, facts = bridge_evidence.watched_pass(model, tokens)
    return judge(model, tokens.shape[1], checks, facts)


def judge(model: Any, length: int, checks: list[LoadCheck], facts: tuple[str, ...]) -> Proof:
    """Build a proof from comparisons.

    Raises:
        UnsupportedModelError: if an essential check failed.
    """
    limits: dict[str, str] = {}
    for check in checks:
        if check.passed:
            continue
        if not check.costs:
            raise UnsupportedModelError(
                f"{model.name} is not supported: {check.what} does not hold on {length} positions "
                f"(relative error {check.gap.size:.2g}, tolerance {check.gap.allowed:.1g})"
                f"{f': {check.reason}' if check.reason else ''}."
            )
        for capability in check.costs:
            limits.setdefault(capability, f"{model.name} {check.reason}.")
    return Proof(length, tuple(_worst(checks)), facts, limits)


def _worst(checks: Iterable[LoadCheck]) -> list[LoadCheck]:
    """The check closest to failing, for each kind."""
    found: dict[str, LoadCheck] = {}
    for check in checks:
        before = found.get(check.what)
        if before is None or _share(check) > _share(before):
            found[check.what] = check
    return list(found.values())


def _share(check: LoadCheck) -> float:
    size, allowed = check.gap.size, check.gap.allowed
    if not size <= float("inf"):
        return float("inf")
    return size / allowed if allowed else (float("inf") if size else 0.0)


def _key(model: Any) -> tuple[nn.Module, object]:
    """The module, and a key that changes with its weights."""
    module: nn.Module = model.module
    kind = (type(module), str(getattr(module, "config", "")))
    named = [*module.named_parameters(), *module.named_buffers()]
    weights = tuple(
        (name, tuple(w.shape), w.dtype, w.device, w.data_ptr(), _version(w), checksum)
        for (name, w), checksum in zip(named, _checksums([w for _, w in named]), strict=True)
    )
    return module, (kind, weights)


def _version(weight: Tensor) -> int:
    """Write counter of a weight in torch; inference tensors have none."""
    return 0 if weight.is_inference() else weight._version


@torch.no_grad()
def _checksums(weights: Sequence[Tensor]) -> list[int]:
    """Checksums of sampled entries of each weight, since writes to ``.data`` bypass the counter.

    Samples from one device are moved to the host together.
    """
    found = [0] * len(weights)
    samples: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for number, weight in enumerate(weights):
        if weight.device.type == "meta" or weight.numel() == 0:
            continue
        step = max(1, weight.numel() // _SAMPLED)
        some = weight.detach().flatten()[::step][: 2 * _SAMPLED].contiguous()
        samples.setdefault(weight.device, []).append((number, some.view(torch.uint8)))
    for numbered in samples.values():
        moved = torch.cat([sample for _, sample in numbered]).cpu()
        sizes = [len(sample) for _, sample in numbered]
        for (number, _), sample in zip(numbered, moved.split(sizes), strict=True):
            found[number] = zlib.crc32(sample.numpy().tobytes())
    return found
