"""Provenance says what the model and the probe say of themselves."""

from importlib.metadata import version

import headscope as hs
from headscope.origin import of_weights, origin
from headscope.probes import repeated_tokens


def test_what_the_model_and_the_probe_say() -> None:
    model = hs.load()
    probe = repeated_tokens(model, length=8, batch=3, seed=5)
    found = origin(model, probe, metric="loss", checks={"hit": True})
    assert (found.model, found.revision, found.weight_digest) == (
        "tiny-gpt2",
        model.revision,
        model.digest(),
    )
    assert (found.path, found.dtype, found.device) == ("hf", "float32", "cpu")
    assert found.probe == {
        "kind": probe.name,
        "examples": 3,
        **probe.settings,
        "metric": "loss",
    }
    assert found.seed == 5
    assert found.checks == {"hit": True}
    assert found.versions["torch"] == version("torch")
    assert origin(model, probe, seed=7).seed == 7


def test_weights_alone_say_so() -> None:
    found = of_weights(hs.load(), circuit="ov")
    assert found.attention == "weights alone"
    assert found.probe == {"circuit": "ov"}
    assert found.seed is None
