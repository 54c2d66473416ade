"""The doctor tells what is true of this computer and of a model."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import headscope as hs
from headscope.cli import doctor
from headscope.cli.app import app
from headscope.cli.doctor import examine
from headscope.errors import HeadscopeError, UnsupportedModelError
from headscope.models import bundled
from headscope.scorers import CATALOGUE, DEFAULT
from tests.models.families import build


def test_environment_is_this_one() -> None:
    facts = doctor.environment()
    assert facts["versions"]["torch"] == version("torch")
    assert facts["versions"]["headscope"] == hs.__version__
    assert len(facts["devices"]) == 1 + torch.cuda.device_count()
    assert 0 < facts["devices"][0]["free"] <= facts["devices"][0]["memory"]
    assert set(facts["bundled"]) == set(bundled.names()) >= {"tiny-gpt2", "tiny-vit"}
    assert facts["missing"] == []
    json.dumps(facts, allow_nan=False)


def test_a_requirement_that_is_not_met_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=99", "no-such-package", "numpy", 'polars>=99; extra == "polars"']
    monkeypatch.setattr(doctor, "requires", lambda package: lines)
    wrong, absent = doctor.environment()["missing"]
    assert wrong == f"torch {version('torch')} is installed (pip install 'torch>=99')"
    assert absent == "no-such-package is not installed (pip install 'no-such-package')"
    with pytest.raises(HeadscopeError, match="cannot work here: torch"):
        CliRunner().invoke(app, ["doctor"], catch_exceptions=False)


def test_what_it_says_of_a_model_is_so() -> None:
    model = hs.load()
    facts = examine(model)
    assert (facts["path"], facts["ablation"], facts["n_kv_heads"]) == ("hf", "suffix replay", 4)
    weights = model.module.state_dict().values()
    unique = {one.data_ptr(): one.nbytes for one in weights if one.is_floating_point()}
    assert facts["weight_bytes"] == sum(unique.values())
    assert set(facts["parts"].values()) == {None}
    assert set(facts["refused"]) == {
        *("rotary_slowness", "next_token", "separator"),  # positions are learned; it looks back
        *("patch_neighbours", "class_token", "registers"),  # it reads texts
    }
    shown = [name for name in DEFAULT if name not in facts["refused"]]  # the rest is for encoders
    assert facts["default_scorers"] == shown


@pytest.mark.parametrize("family", ["gemma2", "bloom", "llama"])
def test_refusals_are_those_of_the_engine(family: str) -> None:
    model = hs.load(build(family))
    facts = examine(model)
    assert facts["path"] == ("bridge" if family == "bloom" else "hf")
    assert facts["tokenizer"] is None
    for name in CATALOGUE:
        if name in facts["refused"]:
            with pytest.raises(HeadscopeError) as refusal:
                hs.score(model, scorers=name)
            if isinstance(refusal.value, UnsupportedModelError):
                assert facts["refused"][name] in str(refusal.value)
    kept = [name for name in CATALOGUE if name not in facts["refused"]]
    assert list(hs.score(model, scorers=kept)) == kept
    assert facts["default_scorers"] == list(hs.score(model))


def test_it_prints_for_people_and_for_programs() -> None:
    shown = CliRunner().invoke(app, ["doctor", "tiny-llama"], catch_exceptions=False).stdout
    assert "4 to a key/value head" in shown
    assert f"{len(CATALOGUE) - 5} of {len(CATALOGUE)} apply" in shown  # 2 look ahead, 3 read images
    printed = CliRunner().invoke(app, ["doctor", "tiny-llama", "--json"], catch_exceptions=False)
    assert json.loads(printed.stdout)["model"]["n_kv_heads"] == 2


def test_a_model_that_cannot_be_had_is_a_sentence_after_the_facts(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tmp_path), "--json"])
    assert isinstance(result.exception, HeadscopeError)
    facts = json.loads(result.stdout)
    assert facts["versions"]["torch"]
    assert "could not be read" in facts["model"]["error"]
