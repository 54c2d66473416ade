"""``headscope doctor``: installed packages, and what headscope can do with MODEL."""

import json
import os
import platform
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from math import isfinite
from typing import Any

import torch

from headscope.circuits import Weights, ov, qk
from headscope.cli.options import Loading
from headscope.cli.output import console
from headscope.errors import HeadscopeError
from headscope.models import bundled
from headscope.models.proof import Proof
from headscope.models.protocol import HeadModel, lacks
from headscope.probes import uses_bos
from headscope.scorer import DefaultProbe
from headscope.scorers import CATALOGUE, DEFAULT

_SHOWN = (
    "headscope",
    "torch",
    "transformers",
    "transformer-lens",
    "accelerate",
    "safetensors",
    "plotly",
    "pandas",
    "pyarrow",
)
# Extra -> what is missing without it. Which extras there are, and what each brings, is read from
# the package.
_GIVES = {
    "paper": "pictures as PNG, SVG and PDF (without it: interactive HTML)",
    "polars": "table.to_polars()",
    "ray": "sweeps over several GPUs or machines",
    "duckdb": "export of sweeps to DuckDB",
    "notebook": "progress bars in notebooks",
    "gguf": "models in GGUF files",
    "docs": "building the documentation",
    "dev": "working on headscope itself",
}


def run(loading: Loading, *, as_json: bool) -> None:
    """Print the facts, then anything that prevents headscope from working.

    Raises:
        HeadscopeError: if headscope cannot work here, or not with this model.
    """
    facts = environment()
    failure: HeadscopeError | None = None
    if facts["missing"]:
        failure = HeadscopeError(f"headscope cannot work here: {'; '.join(facts['missing'])}.")
    elif loading.source is not None:
        try:
            facts["model"] = examine(loading.model())
        except HeadscopeError as error:
            failure = error
            facts["model"] = {"name": loading.source, "error": str(error)}
    if as_json:
        print(json.dumps(facts))
    else:
        _print(facts)
    if failure is not None:
        raise failure


def environment() -> dict[str, Any]:
    """Versions, devices, extras, bundled models, and what is missing, as JSON values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": {name: _version(name) for name in _SHOWN},
        "devices": _devices(),
        "extras": extras(),
        "bundled": {name: list(bundled.checkpoints(name)) for name in bundled.names()},
        "offline": os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"},
        "missing": _missing(),
    }


def extras() -> dict[str, dict[str, Any]]:
    """Optional extras of the package: whether each is installed, and what it adds."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requires("headscope") or ()]
    found = {}
    for name in metadata("headscope").get_all("Provides-Extra") or ():
        brings = [
            one.name
            for one in wanted
            if one.marker is not None
            and one.marker.evaluate({"extra": name})
            and not one.marker.evaluate({"extra": ""})
        ]
        here = all(_version(one) is not None for one in brings)
        found[name] = {"installed": here, "gives": _GIVES.get(name, ", ".join(brings))}
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _missing() -> list[str]:
    """Requirements of headscope that are missing or have an unsupported version."""
    from packaging.requirements import Requirement

    found = []
    for line in requires("headscope") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        have = _version(wanted.name)
        if have is None:
            found.append(f"{wanted.name} is not installed (pip install '{wanted}')")
        elif not wanted.specifier.contains(have, prereleases=True):
            found.append(f"{wanted.name} {have} is installed (pip install '{wanted}')")
    return found


def _devices() -> list[dict[str, Any]]:
    """The CPU, then every GPU visible to torch; memory in bytes."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory": memory.total,
            "free": memory.available,
        }
    ]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        devices.append(
            {
                "device": f"cuda:{number}",
                "name": torch.cuda.get_device_name(number),
                "memory": total,
                "free": free,
            }
        )
    return devices


def _print(facts: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    grid = Table(show_header=False, box=None, pad_edge=False)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        grid.add_row(name, escape(value))

    row("Python", f"{facts['python']} on {facts['platform']}")
    for name, found in facts["versions"].items():
        row(name, found or "missing")
    for one in facts["devices"]:
        cores = f", {one['cores']} cores, {one['threads']} threads" if "cores" in one else ""
        free, total = one["free"] / 1e9, one["memory"] / 1e9
        row(one["device"], f"{one['name']}{cores}, {free:.1f} of {total:.1f} GB free")
    if len(facts["devices"]) == 1:
        row("GPU", "none that torch sees")
    for name, one in facts["extras"].items():
        state = "installed" if one["installed"] else f"missing: pip install 'headscope[{name}]'"
        row(f"extra {name}", f"{one['gives']}: {state}")
    for name, checkpoints in facts["bundled"].items():
        row("bundled", name + (f", {len(checkpoints)} checkpoints" if checkpoints else ""))
    row("Hugging Face", "offline (HF_HUB_OFFLINE is set)" if facts["offline"] else "online")
    console().print(grid)
    model = facts.get("model")
    if model is None or "error" in model:
        return

    print_model(model)


_PATHS = {
    "hf": "hf: fused attention, rows streamed through transformers' attention registry",
    "bridge": "bridge: transformer-lens TransformerBridge, patterns whole, layer by layer",
}
_ENGINES = {"hf": "suffix replay", "bridge": "whole passes"}


def examine(model: HeadModel) -> dict[str, Any]:
    """Path, shape, parts and scorers of a loaded model, as JSON values.

    ``parts`` and ``probes`` map a name to None if it works and otherwise to the reason; ``refused``
    maps every scorer that does not apply to the reason.
    """
    shape = model.shape
    made = _probes(model)
    refused = _refused(model, made)
    module = getattr(model, "module", None)
    tokenizer = model.tokenizer
    return {
        "name": model.name,
        "family": getattr(getattr(module, "config", None), "model_type", None),
        "revision": model.revision,
        "path": model.path,
        "ablation": _ENGINES[model.path],
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_bytes": None if module is None else _bytes(module),
        "n_layers": shape.n_layers,
        "attention_layers": list(shape.attention_layers),
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
        "d_head": shape.d_head,
        "d_model": shape.d_model,
        "d_vocab": shape.d_vocab,
        "n_ctx": shape.n_ctx,
        "windows": list(shape.windows),
        "tokenizer": None if tokenizer is None else type(tokenizer).__name__,
        "bos": uses_bos(model),
        "limits": dict(model.limits),
        "proof": _proof(model),
        "parts": _parts(model),
        "probes": {kind.name: reason for kind, reason in made.items()},
        "refused": refused,
        "default_scorers": [name for name in DEFAULT if name not in refused],
    }


def _proof(model: HeadModel) -> dict[str, Any] | None:
    """Checks that were made when the model was loaded; None if there were none."""
    proof: Proof = getattr(model, "proof", Proof())
    if not proof.checks:
        return None
    return {
        "tokens": proof.tokens,
        "remembered": proof.remembered,
        "facts": list(proof.facts),
        "checks": [
            {
                "what": check.what,
                "holds": check.passed,
                # JSON has no infinity and no NaN
                "difference": check.gap.size if isfinite(check.gap.size) else None,
                "allowed": check.gap.allowed,
            }
            for check in proof.checks
        ],
    }


def _bytes(module: torch.nn.Module) -> int:
    """Size of the weights in bytes, shared ones counted once."""
    return sum({p.data_ptr(): p.numel() * p.element_size() for p in module.parameters()}.values())


def _reason(attempt: Callable[[], object]) -> str | None:
    """Why something does not work, or None."""
    try:
        attempt()
    except HeadscopeError as error:
        return str(error)
    return None


def _parts(model: HeadModel) -> dict[str, str | None]:
    """Parts of the model that weight analyses need."""
    layers = model.shape.attention_layers
    return {
        "weights per head": _reason(lambda: model.weights(layers[0])),
        "linear write": model.limits.get("linear_write"),
        "norm before attention": _reason(
            lambda: [model.parts.input_norm(layer) for layer in layers]
        ),
        "positions": _reason(lambda: [model.parts.rotation(layer) for layer in layers]),
        "ov_size": _reason(lambda: Weights.of(model).sized("ov")),
        "qk_size": _reason(lambda: Weights.of(model).sized("qk")),
        "embedding": _reason(lambda: model.parts.embedding),
        "final norm and unembedding": _reason(lambda: model.unembedding),
    }


def _probes(model: HeadModel) -> dict[DefaultProbe, str | None]:
    """Default kinds of probes, each with the reason why it cannot be made, if any."""
    kinds = dict.fromkeys(one.probe for one in CATALOGUE.values() if one.probe is not None)
    return {kind: _reason(partial(kind.make, model, 0)) for kind in kinds}


def _refused(model: HeadModel, made: Mapping[DefaultProbe, str | None]) -> dict[str, str]:
    """Scorers that do not apply to this model, each with the reason."""
    own = {
        "ov_circuit": _reason(lambda: ov(model)),
        "qk_circuit": _reason(lambda: qk(model, offset=0)),
        "ov_size": _reason(lambda: Weights.of(model).sized("ov")),
        "qk_size": _reason(lambda: Weights.of(model).sized("qk")),
        "embedding": _reason(lambda: model.parts.embedding),
    }
    refused = {}
    for name, scorer in CATALOGUE.items():
        reasons = [own[need] if need in own else lacks(model, need) for need in scorer.needs]
        if scorer.probe is not None:
            reasons.append(made[scorer.probe.suited(model)])
        if reason := next(filter(None, reasons), None):
            refused[name] = reason
    return refused


def print_model(facts: dict[str, Any]) -> None:
    """Print what :func:`examine` found, for people."""
    from rich.markup import escape
    from rich.table import Table

    grid = Table(show_header=False, box=None, pad_edge=False)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")

    def row(name: str, value: object) -> None:
        grid.add_row(name, escape(str(value)))

    family = f" ({facts['family']})" if facts["family"] else ""
    size = f", {facts['weight_bytes'] / 1e6:.1f} MB" if facts["weight_bytes"] else ""
    row("model", f"{facts['name']}{family}{size}, {facts['dtype']} on {facts['device']}")
    row("path", _PATHS[facts["path"]])
    row("ablation by", facts["ablation"])
    row("heads", _heads(facts))
    row("context", facts["n_ctx"] or "no limit")
    bos = "with BOS" if facts["bos"] else "no BOS"
    row("tokenizer", f"{facts['tokenizer']}, {bos}" if facts["tokenizer"] else "none")
    proof = facts["proof"]
    proved = "nothing: loaded with check=False"
    if proof:
        earlier = " by an earlier run, with these weights and this code on this device"
        proved = f"{proof['tokens']} tokens{earlier if proof['remembered'] else ''}"
    row("proved on", proved)
    for check in proof["checks"] if proof else ():
        size = "not measured" if check["difference"] is None else f"{check['difference']:.1e}"
        state = "holds" if check["holds"] else "does not hold"
        row("", f"{check['what']}: {state} (error {size}, tolerance {check['allowed']:.0e})")
    for fact in proof["facts"] if proof else ():
        row("", fact)
    for kind, found in (("", facts["parts"]), ("probe ", facts["probes"])):
        for name, reason in found.items():
            row(kind + name, "yes" if reason is None else f"no: {reason}")
    reasons: dict[str, list[str]] = {}
    for name, reason in facts["refused"].items():
        reasons.setdefault(reason, []).append(name)
    row("scorers", f"{len(CATALOGUE) - len(facts['refused'])} of {len(CATALOGUE)} apply")
    for reason, names in reasons.items():
        row("not", f"{', '.join(names)}: {reason}")
    console().print()
    console().print(grid)


def _heads(facts: dict[str, Any]) -> str:
    shared = facts["n_heads"] // facts["n_kv_heads"]
    groups = f", {shared} to a key/value head" if shared > 1 else ""
    layers = f"{facts['n_layers']} layers"
    if len(facts["attention_layers"]) < facts["n_layers"]:
        layers += f" ({len(facts['attention_layers'])} with attention)"
    windows = sorted({one for one in facts["windows"] if one is not None})
    window = f", windows of {', '.join(map(str, windows))} keys" if windows else ""
    return f"{layers} x {facts['n_heads']} heads of {facts['d_head']}{groups}{window}"
