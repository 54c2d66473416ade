"""Sweep configs: short forms, and one sentence for every mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from headscope.errors import InputError
from headscope.models import bundled
from headscope.sweeps import read_config, schema
from tests.sweeps.support import REPEATED, config

GOOD: dict[str, Any] = {
    "name": "x",
    "models": ["tiny-gpt2"],
    "probes": [REPEATED],
    "edits": ["mean"],
    "metrics": ["loss"],
}


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(GOOD | changes))
    return file


def test_words_stand_for_their_first_key(tmp_path: Path) -> None:
    short = read_config(write(tmp_path))
    long = {
        "models": [{"model": "tiny-gpt2"}],
        "edits": [{"method": "mean"}],
        "metrics": [{"metric": "loss"}],
    }
    assert read_config(write(tmp_path, **long)) == short


def test_all_checkpoints_are_those_that_there_are() -> None:
    (model,) = config(models=[{"model": "tiny-gpt2", "checkpoints": "all"}]).models
    assert model.revisions() == bundled.checkpoints("tiny-gpt2")
    assert len(model.revisions()) > 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"modles": ["x"]}, "did you mean 'models'"),
        ({"edits": [{"methd": "mean"}]}, "did you mean 'method'"),
        ({"edits": ["maen"]}, "did you mean 'mean'"),
        ({"edits": ["mean", "mean"]}, "two edits called 'mean'"),
        ({"edits": ["scale"]}, "takes a factor"),
        ({"edits": []}, "the sweep does nothing"),
        ({"edges": ["eap-ig"]}, "did you mean 'eap_ig'"),
        ({"edges": ["eap", "eap"]}, "two edits called 'eap'"),
        ({"edges": [{"method": "eap", "ablation": "median"}]}, "unknown ablation 'median'"),
        ({"edges": [{"method": "eap", "circuits": [5, 5]}]}, "two circuits called '5'"),
        ({"edges": [{"method": "eap", "circuits": [0]}]}, "greater than or equal to 1"),
        ({"edges": ["eap"], "sets": [{"name": "edges"}]}, "two sets called 'edges'"),
        ({"edits": [{"method": "mean", "reference": "text"}]}, "unknown probe 'text'"),
        ({"metrics": ["los"]}, "did you mean 'loss'"),
        ({"probes": [REPEATED, REPEATED]}, "two probes called 'repeated_tokens'"),
        ({"probes": [REPEATED | {"lenght": 3}]}, "did you mean 'length'"),
        ({"sets": [{"name": "a", "score": "inducton"}]}, "did you mean 'induction'"),
        ({"sets": [{"name": "a", "top": 3}]}, "say by which 'score'"),
        ({"sets": [{"name": "a", "random": 3, "not_in": "b"}]}, "unknown set 'b'"),
        ({"sets": [{"name": "a", "draws": 3}]}, "how many with 'random'"),
        ({"sets": [{"name": "a", "steps": 3}]}, "cumulative curves only"),
        ({"sets": [{"name": "a", "arange": "each"}]}, "did you mean 'arrange'"),
        ({"models": [{"model": "gpt2", "checkpoints": "all"}]}, "does not come with checkpoints"),
        ({"models": [{"model": "m", "revision": "a", "checkpoints": ["b"]}]}, "give one of them"),
        ({"models": ["a/tiny", "b/tiny"]}, "two models called 'tiny'"),
        ({"chunk": 0}, "chunk"),
        ({"name": "../up"}, "name"),
    ],
)
def test_mistakes_get_a_sentence(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as error:
        read_config(write(tmp_path, **changes))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_schema_knows_every_key_and_the_short_forms() -> None:
    found = schema()
    assert set(found["properties"]) >= {"models", "probes", "edits", "sets", "metrics", "seeds"}
    edit = found["$defs"]["EditConfig"]
    assert {"type": "string"} in edit["anyOf"]
