"""Read a model from a GGUF file: its weights dequantised, its tokenizer from the same file."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from headscope.errors import HeadscopeError, InputError, ModelLoadError

_SUFFIX = ".gguf"
_MAGIC = b"GGUF"


def is_gguf(source: object) -> bool:
    """Whether a source names a GGUF file."""
    return isinstance(source, str | Path) and str(source).lower().endswith(_SUFFIX)


def check_gguf(source: str | Path, revision: str | None) -> None:
    """Refuse what cannot be read, before anything large is.

    Raises:
        InputError: if a revision is asked of a file.
        ModelLoadError: if there is no such file, it is not a GGUF, or the package gguf is missing.
    """
    if revision is not None:
        raise InputError(f"{source} is a file, which has no revisions: leave revision= out.")
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
    """The config that a GGUF file describes.

    Raises:
        ModelLoadError: if the file is broken, or of an architecture that transformers cannot read.
    """
    from transformers import AutoConfig

    path = Path(source)
    try:
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # foreign files through foreign parsers: anything may come
        raise ModelLoadError(_failure(source, error)) from error


def read_gguf(source: str | Path, config: Any, dtype: torch.dtype | None, device_map: Any) -> Any:
    """The model in a GGUF file, with every weight dequantised.

    Args:
        source: path of the file.
        config: from :func:`read_gguf_config`.
        dtype: type of the weights; default: fp32, in which dequantised weights are exact.
        device_map: spread over devices, as transformers takes it.

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
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise ModelLoadError(
            f"{source} lacks {len(missing)} of the model's weights, e.g. {missing[0]}: download it "
            "again."
        )
    return module


def _dense() -> dict[str, Any]:
    """Ask for plain weights: later versions of transformers may leave them in GGUF's blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _failure(source: str | Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return f"{source} could not be read as a GGUF model ({type(error).__name__}: {reason})."
