"""``headscope doctor``: what is installed here, and what headscope can do with a model."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import Any

from headscope.cli.loading import Loading
from headscope.cli.output import console
from headscope.errors import HeadscopeError
from headscope.models.loading import shipped

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
    """Print the facts; then say in one sentence what stands in the way, if anything does.

    Raises:
        HeadscopeError: if headscope cannot work here, or not with this model.
    """
    facts = environment()
    failure: HeadscopeError | None = None
    if facts["missing"]:
        failure = HeadscopeError(f"headscope cannot work here: {'; '.join(facts['missing'])}.")
    elif loading.source is not None:
        try:
            from headscope.cli.examination import examine

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
        "bundled": {name: list(shipped.checkpoints(name)) for name in shipped.names()},
        "offline": os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"},
        "missing": _missing(),
    }


def extras() -> dict[str, dict[str, Any]]:
    """Every extra of the package: whether all that it brings is here, and what it gives."""
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
    """Requirements of headscope that are absent or of a version that it does not work with."""
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
    """The CPU, then every GPU that torch sees; memory in bytes."""
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
    from headscope.cli.examination import print_model

    print_model(model)
