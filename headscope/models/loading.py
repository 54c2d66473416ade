"""``hs.load``: from a name, folder or module to a verified ``HeadModel``."""

import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from traceback import extract_tb
from typing import Any, NamedTuple

import torch

from headscope.base.arguments import checked
from headscope.base.batches import PIXELS
from headscope.errors import HeadscopeError, InputError, ModelLoadError, UnsupportedModelError
from headscope.models import bundled
from headscope.models.hf.transformers_api import ATTENTION_LAYERS, OTHER_LAYERS, commit_hash
from headscope.models.protocol import HeadModel
from headscope.models.rotary import extrapolate as extrapolate_positions
from headscope.models.running import own_types

_SUFFIX = ".gguf"
_MAGIC = b"GGUF"


def is_gguf(source: object) -> bool:
    """Whether a source is a GGUF file."""
    return isinstance(source, str | Path) and str(source).lower().endswith(_SUFFIX)


def check_gguf(source: str | Path, revision: str | None) -> None:
    """Raise if a file cannot be read, before reading anything large.

    Raises:
        InputError: if a revision is given for a file.
        ModelLoadError: if there is no such file, it is not a GGUF, or the package gguf is missing.
    """
    if revision is not None:
        raise InputError(f"{source} is a file, and files have no revisions: leave out revision=.")
    path = Path(source)
    if not path.is_file():
        raise ModelLoadError(f"there is no file {source}: give the path of a GGUF file.")
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    if start != _MAGIC:
        raise ModelLoadError(
            f"{source} is not a GGUF file: it does not begin with the letters GGUF. Download it "
            "again, or give the folder of a Hugging Face model."
        )
    if find_spec("gguf") is None:
        raise ModelLoadError(
            f"{source} cannot be read without the package gguf: pip install 'headscope[gguf]'."
        )


def read_gguf_config(source: str | Path) -> Any:
    """Read the config of a GGUF file.

    Raises:
        ModelLoadError: if the file is broken, or has an architecture that transformers cannot read.
    """
    from transformers import AutoConfig

    path = Path(source)
    try:
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # untrusted files in third-party parsers can raise anything
        raise ModelLoadError(_failure(source, error)) from error


def read_gguf(source: str | Path, config: Any, dtype: torch.dtype | None, device_map: Any) -> Any:
    """Load the model in a GGUF file, with every weight dequantised.

    Args:
        source: path of the file.
        config: from :func:`read_gguf_config`.
        dtype: dtype of the weights. Default: fp32, in which dequantised weights are exact.
        device_map: placement over several devices, as for transformers.

    Raises:
        ModelLoadError: if the file is broken, or lacks a weight.
    """
    from transformers import AutoModelForCausalLM

    path = Path(source)
    try:
        module, found = AutoModelForCausalLM.from_pretrained(
            path.parent,
            config=config,
            gguf_file=path.name,
            dtype=torch.float32 if dtype is None else dtype,
            device_map=device_map,
            output_loading_info=True,
            **_dense(),
        )
    except HeadscopeError:
        raise
    except Exception as error:  # as above
        raise ModelLoadError(_failure(source, error)) from error
    _check_complete(source, module, found)
    return module


def _check_complete(source: str | Path, module: Any, found: Mapping[str, Any]) -> None:
    """Refuse a model without all its weights; transformers would continue with random ones.

    Many checkpoints were saved without the pooler of the bare model: it is taken off, as
    ``add_pooling_layer=False`` does, so that its random output is never read.

    Args:
        source: where it was read from.
        module: the model.
        found: loading info of transformers.

    Raises:
        ModelLoadError: with the first weight that is missing.
    """
    keys = [key.split(".") for key in sorted(found["missing_keys"])]
    for owner in {".".join(key[: key.index("pooler")]) for key in keys if "pooler" in key}:
        module.get_submodule(owner).pooler = None
    missing = [".".join(key) for key in keys if "pooler" not in key]
    if missing:
        raise ModelLoadError(
            f"{source} lacks {len(missing)} of the model's weights, e.g. {missing[0]}: download it "
            "again, or save it again with save_pretrained."
        )


def _dense() -> dict[str, Any]:
    """Arguments for plain weights, since later versions of transformers may keep GGUF's blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _failure(source: str | Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return f"{source} could not be read as a GGUF model ({type(error).__name__}: {reason})."


KNOWN_LAYERS = ATTENTION_LAYERS | OTHER_LAYERS
# Number of tokens in the passes that find a model's parts.
_SHORTEST = 5


def admit(config: Any, name: str) -> None:
    """Check that a model with this config may have heads that headscope can read.

    Raises:
        UnsupportedModelError: if it certainly has none, with the reason.
    """
    text = config.get_text_config()
    family = getattr(config, "model_type", "unknown")
    reason = None
    if getattr(text, "kv_lora_rank", None):
        reason = "it uses multi-head latent attention (MLA), with compressed keys and values"
    elif (getattr(text, "max_position_embeddings", None) or _SHORTEST) < _SHORTEST:
        reason = f"its context is too short to take its heads apart: {_SHORTEST} tokens at least"
    elif str(family).startswith("gemma4") and getattr(text, "num_kv_shared_layers", None):
        reason = (
            "it drops positions before its layers that share keys and values, so that not every "
            "row of attention exists"
        )
    elif not _has_heads(text):
        reason = "it has no attention heads (a state-space or recurrent model)"
    elif unknown := sorted(set(getattr(text, "layer_types", None) or ()) - KNOWN_LAYERS):
        reason = (
            f"it has layers of the kind {unknown[0]!r}, whose visible keys headscope cannot tell"
        )
    if reason is not None:
        raise UnsupportedModelError(
            f"{name} ({family}) is not supported: {reason}. Decoders, encoders (of texts or "
            "images) and encoder-decoders with ordinary or grouped-query attention are."
        )


def _has_heads(config: Any) -> bool:
    recurrent = ("mamba", "rwkv", "xlstm")
    if str(getattr(config, "model_type", "")).startswith(recurrent):
        return False
    return any(getattr(config, key, None) for key in ("num_attention_heads", "n_head", "num_heads"))


def auto_class(config: Any) -> Any:
    """Return the ``AutoModel...`` class that loads a checkpoint with all its trained weights.

    A causal language model if the config names one or nothing known, a masked language model or an
    image classifier if the config names one, and the bare model for any other head (sentence
    encoders, text classifiers), whose weights a language-model head would not find.

    Args:
        config: transformers config of the checkpoint.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_MAPPING,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSpeechSeq2Seq,
    )
    from transformers import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING as SPEECH

    kind = type(config)
    if is_of_halves(config):
        raise UnsupportedModelError(
            f"it is two models side by side, one of images and one of texts ({config.model_type}): "
            "hs.vision.clip(source) loads both."
        )
    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSpeechSeq2Seq if kind in SPEECH else AutoModelForSeq2SeqLM
    bare = MODEL_MAPPING.get(kind, None)
    if getattr(bare, "main_input_name", None) == PIXELS:
        classifies = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(kind, None)
        heads = classifies if isinstance(classifies, tuple | list) else (classifies,)
        wanted = (getattr(config, "architectures", None) or [""])[0]
        known = wanted in {_name(one) for one in heads}
        return AutoModelForImageClassification if known else AutoModel
    masked = MODEL_FOR_MASKED_LM_MAPPING.get(kind, None)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    named = (getattr(config, "architectures", None) or [""])[0]
    if masked is None or named == _name(causal) or getattr(config, "is_decoder", False):
        return AutoModelForCausalLM
    if named in (_name(masked), "") or named.endswith("ForPreTraining"):
        return AutoModelForMaskedLM
    return AutoModel


def is_of_halves(config: Any) -> bool:
    """Whether a checkpoint is an image model and a text model with one embedding space."""
    from transformers import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING as COMPARING

    both = hasattr(config, "vision_config") and hasattr(config, "text_config")
    return both and type(config) in COMPARING


class Halves(NamedTuple):
    """Two models that embed images and texts in one space; see :class:`headscope.vision.Clip`."""

    vision: HeadModel
    text: HeadModel
    scale: float
    bias: float


def load_halves(
    source: Any,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: Any = None,
) -> Halves:
    """Load both halves of a model such as CLIP; see :func:`load` for the arguments.

    Raises:
        ModelLoadError: if the model is missing, unreadable or broken.
        UnsupportedModelError: if it does not consist of an image model and a text model.
    """
    from headscope.models.hf.layout import halves
    from headscope.models.hf.model import HFModel

    _check_device(device)
    module, place = source, ""
    if isinstance(source, str | Path):
        from transformers import AutoConfig, AutoModel

        place = str(source)
        code: dict[str, Any] = {} if revision is None else {"revision": revision}
        try:
            config = AutoConfig.from_pretrained(place, **code)
            if not is_of_halves(config):
                raise UnsupportedModelError(
                    f"{place} ({config.model_type}) does not consist of an image model and a text "
                    "model: load it with hs.load."
                )
            module, found = AutoModel.from_pretrained(
                place,
                config=config,
                dtype=_dtype(dtype) or "auto",
                use_safetensors=True,
                output_loading_info=True,
                **code,
            )
            _check_complete(place, module, found)
        except HeadscopeError:
            raise
        except Exception as error:  # untrusted files in third-party parsers can raise anything
            raise ModelLoadError(_load_failure(place, place, error, False)) from error
        module = _placed(module, device, None).eval()
        tokenizer = _tokenizer(place, code) if tokenizer is None else tokenizer
    name = place or getattr(getattr(module, "config", None), "name_or_path", "")
    try:
        vision, text = halves(module)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{type(module).__name__} is not supported: {error}") from error
    sees, reads = (
        _wrapped(half, tokens, f"{name or type(module).__name__} ({what})", revision, True)
        for half, tokens, what in ((vision, None, "vision"), (text, tokenizer, "text"))
    )
    if place and isinstance(sees, HFModel):
        sees.image_processor = _image_processor(place, revision)
    scale, bias = module.logit_scale.detach(), getattr(module, "logit_bias", None)
    return Halves(sees, reads, float(scale.exp()), 0.0 if bias is None else float(bias.detach()))


def _name(made: Any) -> str:
    """Name of a class; of the first if there are several."""
    first = made[0] if isinstance(made, tuple | list) else made
    return getattr(first, "__name__", "-")


_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@checked
def load(
    source: Any = None,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    check: bool = True,
    extrapolate: bool = False,
) -> HeadModel:
    """Load a model: a decoder, an encoder (BERT, ViT), or an encoder-decoder such as T5.

    An encoder-decoder has three attention stacks, ``model.stacks``; ``model.stack("cross")`` is one
    of them, usable as a model.

    Args:
        source: a Hugging Face name, a local folder, a ``.gguf`` file (read dequantised, in fp32;
            needs ``headscope[gguf]``), a ``PreTrainedModel``, a transformer-lens
            ``TransformerBridge``, any object that an installed adapter accepts (entry points of the
            group ``headscope.adapters``), the name of a bundled model, or None for the default one.
            A model that you pass is used directly and left unchanged; headscope's passes run it
            uncompiled and in evaluation mode.
        revision: branch, tag or commit; for a bundled model, one of its training checkpoints.
        device: device of the weights. Default: a GPU if there is one, else the CPU.
        dtype: dtype of the weights. Default: as stored.
        device_map: placement over several devices, as for transformers; excludes ``device``.
        tokenizer: tokenizer of a model that you pass; otherwise it is loaded with the model, with a
            warning if it cannot be read.
        trust_remote_code: run code from the model's repository; requires a 40-digit ``revision``.
        allow_pickle: also accept weights that are not safetensors.
        check: verify on a text of 64 to 256 tokens that headscope reads what the model computes
            (two passes, once per process for the same weights); see ``model.proof``. Of a model
            read from files, the proof is kept for later runs with the same weights, code and device
            (``model.proof.remembered``), in ``HEADSCOPE_CACHE``.
        extrapolate: accept texts longer than the config's context, for rotary positions only;
            results that use such positions are marked.

    Raises:
        InputError: if the arguments do not fit together.
        ModelLoadError: if the model is missing, unreadable or broken.
        UnsupportedModelError: if its heads cannot be separated.

    Example:
        >>> load().shape.n_layers > 0
        True
    """
    if device is not None and device_map is not None:
        raise InputError("give either device or device_map, not both.")
    if isinstance(device_map, str | torch.device) and str(device_map).startswith("meta"):
        _check_device(device_map)
    _check_device(device)
    if trust_remote_code and not _is_commit(revision):
        raise InputError(
            "trust_remote_code runs code from the model's repository: pin it with "
            "revision=<40-digit commit> after reviewing that code."
        )
    if source is None or isinstance(source, str | Path):
        given, tokenizer, name, commit = _from_files(
            source, revision, device, _dtype(dtype), device_map, trust_remote_code, allow_pickle
        )
        # Code that came with a model is looked at each time, as is a model that the caller made.
        seen = _wrapped(given, tokenizer, name, commit, check, remember=not trust_remote_code)
        return _lifted(seen, given, extrapolate)
    if type(source).__module__.split(".")[0] == "transformer_lens":
        from headscope.models.bridge.model import without_own_hooks, wrap_bridge
        from headscope.models.proof import prove

        bridge = wrap_bridge(source, tokenizer=tokenizer)
        if check:
            with without_own_hooks(source):
                prove(bridge)
        return _lifted(bridge, bridge.module, extrapolate)
    from transformers import PreTrainedModel

    other = adapted(source, tokenizer)
    if other is not None:
        return other
    source = getattr(source, "_orig_mod", source)  # torch.compile(model); passes run uncompiled
    if not isinstance(source, PreTrainedModel):
        raise InputError(
            f"load() takes a name, a folder, a PreTrainedModel or a TransformerBridge; got "
            f"{type(source).__name__}."
        )
    name = source.config.name_or_path or type(source).__name__
    admit(source.config, name)
    return _lifted(_wrapped(source, tokenizer, name, revision, check), source, extrapolate)


def _lifted(model: HeadModel, module: Any, wanted: bool) -> HeadModel:
    """Lift the limit on text length, if requested."""
    if wanted:
        extrapolate_positions(model, module.config)
    return model


def _wrapped(
    module: Any,
    tokenizer: Any,
    name: str,
    revision: str | None,
    check: bool,
    *,
    remember: bool = False,
) -> HeadModel:
    """Choose the path and verify the hook points."""
    from headscope.models.hf.model import HFModel
    from headscope.models.hf.seq2seq import Seq2SeqModel, is_seq2seq
    from headscope.models.proof import prove

    facts = {"tokenizer": tokenizer, "name": name, "revision": revision}
    family = f"{name} ({module.config.model_type})"
    try:
        kind: Any = Seq2SeqModel if is_seq2seq(module) else HFModel
        model: Any = kind.wrap(module, **facts)
        if model is None:
            model = _beside_the_registry(module, facts)
        if check:
            prove(model, remember=remember and model.path == "hf")
        if isinstance(model, HFModel) and (model.grid or model.image_token) is not None:
            model.image_processor = _image_processor(module.config.name_or_path, revision)
    except UnsupportedModelError as error:
        if str(error).startswith(name):
            raise
        raise UnsupportedModelError(f"{family} is not supported: {error}") from error
    except HeadscopeError:
        raise
    except Exception as error:  # third-party model code may fail in headscope's passes
        _check_runs(module, name)
        raise UnsupportedModelError(f"{family} is not supported: {_stopped(error)}") from error
    seen: HeadModel = model
    return seen


def _image_processor(place: str, revision: str | None) -> Mapping[str, Any] | None:
    """What the model's config says of how pictures are prepared; None if it says nothing."""
    from transformers.image_processing_base import ImageProcessingMixin

    if not place:
        return None
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(place, revision=revision)
    except (OSError, ValueError):
        return None
    return dict(found)


def _beside_the_registry(module: Any, facts: Mapping[str, Any]) -> Any:
    """A model whose attention transformers' attention functions do not compute.

    Decoders of text are opened by transformer-lens where it knows them; of all others, the code of
    their attention is looked into.

    Raises:
        UnsupportedModelError: if neither can be done.
    """
    from transformers import AutoModelForCausalLM

    from headscope.models.bridge.model import wrap_bridge
    from headscope.models.hf.model import HFModel

    decoder = auto_class(module.config) is AutoModelForCausalLM
    own = None if decoder else HFModel.wrap(module, own_code=True, **facts)
    if own is not None:
        return own
    try:
        bridge = _bridged(module)
    except UnsupportedModelError:
        own = HFModel.wrap(module, own_code=True, **facts) if decoder else None
        if own is None:
            raise
        return own
    return wrap_bridge(bridge, **facts)


def _bridged(module: Any) -> Any:
    """Bridge over a module with custom attention code.

    Raises:
        UnsupportedModelError: if transformer-lens cannot open it.
    """
    from transformers import AutoModelForCausalLM

    from headscope.models.bridge.model import bridge_over

    try:
        return bridge_over(module)
    except UnsupportedModelError as error:
        if auto_class(module.config) is AutoModelForCausalLM:
            raise
        raise UnsupportedModelError(
            "its attention is code of its own and not one of transformers' attention functions "
            "(e.g. as it adds scores of relative positions to those of queries and keys), so its "
            f"rows cannot be told, and {str(error).rpartition('is not supported: ')[2]}"
        ) from error


def _stopped(error: Exception) -> str:
    """Describe an error that only occurs with recorded attention.

    The last line of the family's own code shows whether the mask was involved: headscope passes on
    which keys are padding and builds no mask.
    """
    frames = extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).name.startswith("modeling_")]
    if not own:
        return f"headscope could not take it apart by heads ({type(error).__name__})."
    place = f"{own[-1].name} in {Path(own[-1].filename).name}"
    if "mask" in (own[-1].line or ""):
        return (
            f"its attention makes more of the mask than which keys are visible (in {place}), and "
            "what that does to its rows is not known to headscope."
        )
    return (
        "its code does not run on the short text and the attention that headscope measures it with "
        f"({type(error).__name__} in {place})."
    )


@torch.no_grad()
def _check_runs(module: Any, name: str) -> None:
    """Check that a model runs at all.

    Raises:
        ModelLoadError: if it does not run, with headscope or without.
    """
    from headscope.models.hf.evidence import own_answer
    from headscope.models.hf.layout import arguments, tiny_batch

    own_answer(module, arguments(module, tiny_batch(module)), name)


@own_types()
def _from_files(
    source: str | Path | None,
    revision: str | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    device_map: Any,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> tuple[Any, Any, str, str | None]:
    """Read config, weights and tokenizer; return them with the model's name and commit."""
    from transformers import AutoConfig

    from headscope.models.hf.removal import is_pruned, read_pruned

    name = bundled.DEFAULT if source is None else str(source)
    if source is not None and is_gguf(source):
        check_gguf(source, revision)
        config = read_gguf_config(source)
        admit(config, name)
        module = _placed(read_gguf(source, config, dtype, device_map), device, device_map)
        file = Path(source)
        return module.eval(), _tokenizer(str(file.parent), {"gguf_file": file.name}), name, None
    place = name
    code: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    tokenizer_place = name
    if name in bundled.names() and not Path(name).exists():
        place = str(bundled.folder(name, revision))
        tokenizer_place = str(bundled.folder(name))
        dtype = torch.float32 if dtype is None else dtype  # checkpoints are stored in half
    elif revision is not None:
        code["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(place, **code)
        admit(config, name)
        options: dict[str, Any] = code | {
            "config": config,
            "dtype": "auto" if dtype is None else dtype,
            "device_map": device_map,
            "use_safetensors": None if allow_pickle else True,
        }
        if is_pruned(config):
            module = read_pruned(place, **options)
        else:
            kind = auto_class(config)
            module, found = kind.from_pretrained(place, output_loading_info=True, **options)
            _check_complete(name, module, found)
    except HeadscopeError:
        raise
    except Exception as error:  # untrusted files in third-party parsers can raise anything
        raise ModelLoadError(_load_failure(name, place, error, allow_pickle)) from error
    module = _placed(module, device, device_map)
    commit = commit_hash(config, place, revision)
    return module.eval(), _tokenizer(tokenizer_place, code), name, commit


def _placed(module: Any, device: str | torch.device | None, device_map: Any) -> Any:
    """Move a model to its device; a device map has already placed it."""
    if device_map is None:
        module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return module


def _tokenizer(place: str, code: dict[str, Any]) -> Any:
    """Load the tokenizer; None if the model has none, or, with a warning, one that cannot be read.

    Models are usable without one: random tokens need no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **code)
        # Without files some families get a tokenizer of special tokens alone.
        return tokenizer if {*tokenizer.get_vocab()} - {*tokenizer.all_special_tokens} else None
    except Exception as error:  # as above; callers that need a tokenizer report that there is none
        if "gguf_file" in code or any((Path(place) / file).is_file() for file in _TOKENIZER_FILES):
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            where = code.get("gguf_file", place)
            warnings.warn(f"the tokenizer in {where} could not be read: {reason}", stacklevel=2)
        return None


def _load_failure(name: str, place: str, error: Exception, allow_pickle: bool) -> str:
    text = " ".join(str(error).split())
    if type(error).__name__ == "UnpicklingError":  # torch's message advises disabling the guard
        return (
            f"the pickled weights of {name} contain objects other than tensors, which could run "
            "code; they were not loaded."
        )
    if Path(place).exists():
        if "safetensors" in text and not allow_pickle:
            return (
                f"{name} holds no safetensors weights; pickled weights can run code, so they are "
                "read only with allow_pickle=True (--allow-pickle)."
            )
        return f"{name} could not be read as a model: {text[:300] or type(error).__name__}"
    if _looks_like_path(place):
        there = Path(place).expanduser().parent
        beside = sorted(one.name for one in there.iterdir()) if there.is_dir() else []
        close = get_close_matches(Path(place).name, beside, n=1)
        guess = f" Did you mean {str(there / close[0])!r}?" if close else ""
        return (
            f"there is no model folder {name!r}.{guess} Give a folder with a config.json, a name "
            f"on Hugging Face such as gpt2, or a bundled model: {', '.join(bundled.names())}."
        )
    return (
        f"no model {name!r}: it is neither a folder here, nor one of the bundled models "
        f"({', '.join(bundled.names())}), nor could it be loaded from Hugging Face: {text[:200]}"
    )


def _looks_like_path(place: str) -> bool:
    """Whether a name can only be a path; Hugging Face names are ``NAME`` or ``OWNER/NAME``."""
    return place.startswith((".", "~", "/", "\\")) or place.count("/") > 1 or "\\" in place


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: one of {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


def _check_device(device: str | torch.device | None) -> None:
    """Raise if a device is unavailable, before reading anything.

    Raises:
        InputError: if torch does not know it, was built without it, or does not find it.
    """
    if device is None:
        return
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}: give cpu, cuda or cuda:1.") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {str(device)!r} was requested, but torch finds no GPU: use cpu.")
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0][:100]
        raise InputError(f"device {str(device)!r} is unusable: {reason}") from error
    if place.type == "meta":
        raise InputError("device 'meta' has no data: give cpu, cuda or cuda:1.")


def _is_commit(revision: str | None) -> bool:
    return (
        revision is not None
        and len(revision) == 40
        and all(digit in "0123456789abcdef" for digit in revision)
    )


GROUP = "headscope.adapters"


def adapted(source: Any, tokenizer: Any = None) -> HeadModel | None:
    """Wrap an object with an installed adapter; None if none applies.

    An adapter is a function ``(source, tokenizer) -> HeadModel | None`` that a package names under
    ``[project.entry-points."headscope.adapters"]``; it returns None for objects that it does not
    support. Adapters are tried in the order of their names. Test an adapter with
    :func:`headscope.testing.check_model`.

    Args:
        source: argument of :func:`headscope.load`, never a name or a path.
        tokenizer: tokenizer that was given with it.

    Raises:
        InputError: if an adapter cannot be imported, or returns something else.

    Example:
        >>> adapted(object()) is None
        True
    """
    for point in sorted(entry_points(group=GROUP), key=lambda one: one.name):
        try:
            adapter = point.load()
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"the adapter {point.name!r} ({point.value}) cannot be imported: {error}. Fix or "
                "uninstall the package that provides it."
            ) from None
        made = adapter(source, tokenizer)
        if made is None:
            continue
        if not isinstance(made, HeadModel):
            raise InputError(
                f"the adapter {point.name!r} ({point.value}) returned {type(made).__name__}, which "
                "is not a HeadModel: see headscope.testing.check_model."
            )
        return made
    return None
