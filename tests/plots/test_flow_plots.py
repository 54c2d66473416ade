"""Pictures of flow say what the numbers say."""

import numpy as np
import pytest

import headscope as hs
from headscope.errors import InputError

PROMPT = "When Mary and John went to the store, John gave a drink to"


def test_a_token_flow_leaves_padding_and_unasked_rows_out() -> None:
    model = hs.load()
    probe = hs.probes.text(model, [PROMPT, "The cat sat."])
    flow = hs.flow.rollout(model, probe)
    figure = hs.plots.token_flow(flow, 1)
    real = int(probe.real[1].sum())
    cells = np.asarray(figure.data[0].customdata)
    assert cells == pytest.approx(flow.matrix[1, :real, :real], abs=1e-6)
    rows = hs.plots.token_flow(hs.flow.max_flow(model, probe, at="last"), 1).data[0].y
    assert len(rows) == 1
    with pytest.raises(InputError, match="none has number 2"):
        hs.plots.token_flow(flow, 2)


def test_a_mixing_map_has_a_cell_per_layer_and_real_token() -> None:
    model = hs.load()
    probe = hs.probes.text(model, [PROMPT, "The cat sat."])
    found = hs.flow.norms(model, probe)
    cells = hs.plots.mixing_map(found, 1).data[0].z
    assert cells == pytest.approx(found.mixing_ratio[::-1, 1, : int(probe.real[1].sum())])
    with pytest.raises(InputError, match="did you mean 'attention'"):
        hs.plots.mixing_map(found, form="atention")


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_a_route_graph_draws_every_edge_once(name: str) -> None:
    model = hs.load(name)
    found = hs.flow.routes(model, PROMPT)
    figure = hs.plots.route_graph(found)
    drawn = [edge for edge in found.edges if edge.kind != "bias"]
    curves = [trace for trace in figure.data if trace.mode == "lines" and len(trace.x) > 1]
    ends = sum(int(np.isnan(np.asarray(trace.x, float)).sum()) for trace in curves)
    assert ends == len(drawn)
    assert len(figure.data[-1].text) == len(drawn)
    fewer = hs.plots.route_graph(found, most=5)
    assert len(fewer.data[-1].text) == 5
    assert f"5 of {len(drawn)} edges" in fewer.layout.title.subtitle.text
    with pytest.raises(InputError, match="give 1 or more"):
        hs.plots.route_graph(found, most=0)


def test_a_token_that_is_markup_does_not_act() -> None:
    model = hs.load()
    found = hs.flow.routes(model, "a <b>bold</b> word %{x} <script>")
    assert "<script>" not in hs.plots.route_graph(found).to_json()
