"""Whatever is changed in a sweep's config: a config, or one sentence."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from headscope.sweeps import SweepConfig, read_config
from tests.conftest import ROOT
from tests.fuzz.effort import effort
from tests.fuzz.test_configs import outcome, values

SHIPPED = [
    yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested mappings and lists."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(one, (*path, key))
    return found


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
    config: dict[str, Any] = deepcopy(draw(st.sampled_from(SHIPPED)))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(config)))
        holder: Any = config
        for key in way:
            holder = holder[key]
        match draw(st.sampled_from(("other", "gone", "more", "twice"))):
            case "gone" if len(config) > 1:
                del holder[last]
            case "more" if isinstance(holder, dict):
                holder[draw(st.text(max_size=6))] = draw(values)
            case "twice" if isinstance(holder, list):
                holder.append(deepcopy(holder[last]))
            case _:
                holder[last] = draw(values)
    return config


@effort(60)
@given(changed())
def test_any_change_of_a_sweep(tmp_path_factory: pytest.TempPathFactory, config: Any) -> None:
    file: Path = tmp_path_factory.getbasetemp() / "sweep.yaml"
    file.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    found = outcome(lambda: read_config(file))
    assert isinstance(found, SweepConfig | str)
