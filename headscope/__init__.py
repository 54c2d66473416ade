"""headscope measures what every attention head of a transformer does.

    import headscope as hs

    model = hs.load()                    # the bundled model; or a name, a folder, your own model
    table = hs.score(model)              # layers x heads x scores
    table.top("induction", 5)
    hs.plots.heatmap(table["induction"])

This file is the whole public surface; everything else may be rearranged. Names are loaded when
first used, so that importing headscope (and printing the command line's help) needs neither torch
nor transformers. To publish a name, add it twice: to the imports, which type checkers read, and
to ``_HOME``, which Python reads. A test holds the two equal.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headscope import ablation as ablation
    from headscope import alignment as alignment
    from headscope import capture as capture
    from headscope import circuits as circuits
    from headscope import compiled as compiled
    from headscope import diffusion as diffusion
    from headscope import edges as edges
    from headscope import edits as edits
    from headscope import flow as flow
    from headscope import geometry as geometry
    from headscope import interventions as interventions
    from headscope import kinds as kinds
    from headscope import lens as lens
    from headscope import metrics as metrics
    from headscope import plots as plots
    from headscope import probes as probes
    from headscope import pruning as pruning
    from headscope import relevance as relevance
    from headscope import retrieval as retrieval
    from headscope import scorers as scorers
    from headscope import similarity as similarity
    from headscope import steering as steering
    from headscope import studies as studies
    from headscope import sweeps as sweeps
    from headscope import syntax as syntax
    from headscope import testing as testing
    from headscope import training as training
    from headscope import vision as vision
    from headscope.ablation import ablate_cumulatively as ablate_cumulatively
    from headscope.ablation import ablate_groups as ablate_groups
    from headscope.ablation import ablate_heads as ablate_heads
    from headscope.ablation import estimate_heads as estimate_heads
    from headscope.ablation import interactions as interactions
    from headscope.ablation import patch_activations as patch_activations
    from headscope.ablation import patch_stream as patch_stream
    from headscope.ablation import path_patch as path_patch
    from headscope.ablation import screen_heads as screen_heads
    from headscope.comparing import compare as compare
    from headscope.comparing import emergence as emergence
    from headscope.errors import HeadscopeError as HeadscopeError
    from headscope.heads import HeadIndex as HeadIndex
    from headscope.heads import ModelShape as ModelShape
    from headscope.interactive import attention_view as attention_view
    from headscope.interactive import explain as explain
    from headscope.models.loading import load as load
    from headscope.models.taps import Tap as Tap
    from headscope.planning import plan as plan
    from headscope.probes import Probe as Probe
    from headscope.pruning import prune as prune
    from headscope.retrieval import mask_heads as mask_heads
    from headscope.scorers import AttentionRows as AttentionRows
    from headscope.scorers import gradient_scorer as gradient_scorer
    from headscope.scorers import output_scorer as output_scorer
    from headscope.scorers import qk_scorer as qk_scorer
    from headscope.scorers import row_scorer as row_scorer
    from headscope.scorers import weight_scorer as weight_scorer
    from headscope.scoring.score import score as score
    from headscope.table import EffectGrid as EffectGrid
    from headscope.table import HeadScores as HeadScores
    from headscope.table import HeadTable as HeadTable
    from headscope.table import PairScores as PairScores
    from headscope.table import Provenance as Provenance
    from headscope.table import ScoreSpec as ScoreSpec

__version__ = "0.1.0"

# Name -> the module that defines it; a name that is itself a module is its own home. No function
# here may share its name with a module directly under headscope: importing that module would put
# the module in the function's place. Hence `score` lives in scoring/, `prune` in pruning/.
_HOME = {
    "AttentionRows": "headscope.scorers",
    "EffectGrid": "headscope.table",
    "HeadIndex": "headscope.heads",
    "HeadScores": "headscope.table",
    "HeadTable": "headscope.table",
    "HeadscopeError": "headscope.errors",
    "ModelShape": "headscope.heads",
    "PairScores": "headscope.table",
    "Probe": "headscope.probes",
    "Provenance": "headscope.table",
    "ScoreSpec": "headscope.table",
    "Tap": "headscope.models.taps",
    "ablate_cumulatively": "headscope.ablation",
    "ablate_groups": "headscope.ablation",
    "ablate_heads": "headscope.ablation",
    "ablation": "headscope.ablation",
    "alignment": "headscope.alignment",
    "attention_view": "headscope.interactive",
    "capture": "headscope.capture",
    "circuits": "headscope.circuits",
    "compare": "headscope.comparing",
    "compiled": "headscope.compiled",
    "diffusion": "headscope.diffusion",
    "edges": "headscope.edges",
    "edits": "headscope.edits",
    "emergence": "headscope.comparing",
    "estimate_heads": "headscope.ablation",
    "explain": "headscope.interactive",
    "flow": "headscope.flow",
    "geometry": "headscope.geometry",
    "gradient_scorer": "headscope.scorers",
    "interactions": "headscope.ablation",
    "interventions": "headscope.interventions",
    "kinds": "headscope.kinds",
    "lens": "headscope.lens",
    "load": "headscope.models.loading",
    "mask_heads": "headscope.retrieval",
    "metrics": "headscope.metrics",
    "output_scorer": "headscope.scorers",
    "patch_activations": "headscope.ablation",
    "patch_stream": "headscope.ablation",
    "path_patch": "headscope.ablation",
    "plan": "headscope.planning",
    "plots": "headscope.plots",
    "probes": "headscope.probes",
    "prune": "headscope.pruning",
    "pruning": "headscope.pruning",
    "qk_scorer": "headscope.scorers",
    "relevance": "headscope.relevance",
    "retrieval": "headscope.retrieval",
    "row_scorer": "headscope.scorers",
    "score": "headscope.scoring.score",
    "scorers": "headscope.scorers",
    "screen_heads": "headscope.ablation",
    "similarity": "headscope.similarity",
    "steering": "headscope.steering",
    "studies": "headscope.studies",
    "sweeps": "headscope.sweeps",
    "syntax": "headscope.syntax",
    "testing": "headscope.testing",
    "training": "headscope.training",
    "vision": "headscope.vision",
    "weight_scorer": "headscope.scorers",
}

if not TYPE_CHECKING:  # a type checker that saw these would take every name for an unknown object
    __all__ = [*_HOME, "__version__"]

    def __getattr__(name: str) -> object:
        """Import a public name on first use."""
        if name not in _HOME:
            raise AttributeError(f"module 'headscope' has no attribute {name!r}")
        home = _HOME[name]
        module = import_module(home)
        value = module if home == f"headscope.{name}" else getattr(module, name)
        globals()[name] = value  # the next use is a plain lookup
        return value

    def __dir__() -> list[str]:
        """List the public names."""
        return sorted(__all__)
