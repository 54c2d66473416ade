import json

import pytest

from headscope.errors import InputError
from headscope.table import Provenance, versions


def test_round_trip_through_json() -> None:
    one = Provenance(
        model="gpt2",
        probe={"name": "needle", "depths": [0.1, 0.5]},
        seed=3,
        versions={"numpy": "2"},
    )
    assert Provenance.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_unknown_field_is_named() -> None:
    with pytest.raises(InputError, match=r"'modell'.*did you mean 'model'"):
        Provenance.from_json({"modell": "gpt2"})


@pytest.mark.parametrize(
    "path", ["/home/ada/models/tiny", "~/models/tiny", "C:\\Users\\ada\\tiny", "/srv/ada/tiny/"]
)
def test_absolute_paths_are_cut(path: str) -> None:
    one = Provenance(model=path, probe={"files": [path], "deep": {"path": path}})
    assert one.model == "tiny"
    assert "ada" not in json.dumps(one.to_json())


def test_model_names_are_not_paths() -> None:
    assert Provenance(model="meta-llama/Llama-3.1-8B").model == "meta-llama/Llama-3.1-8B"


def test_versions_without_importing() -> None:
    found = versions(["numpy", "no-such-package-at-all"])
    assert list(found) == ["numpy"]
