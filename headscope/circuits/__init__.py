"""Weight-only analysis: QK and OV circuits, spectra, vocabulary, composition.

factors = hs.circuits.ov(model)              # all heads at once; nothing multiplied out
factors.svd().S                              # [layer head d_head]
hs.circuits.qk(model, offset=1).svd()        # exact at distance 1 under rotary positions
hs.circuits.composition(model, "K").top(5)   # pairs of heads
hs.circuits.strongest_paths(model, modes=["K"])
hs.circuits.score(model)                     # HeadTable of all weight scores
hs.circuits.head_card(model, "L2H5")         # all of it for one head
hs.circuits.survey(model)                    # all of it for all heads
"""

from headscope.circuits.composition import ComponentScores as ComponentScores
from headscope.circuits.composition import Path as Path
from headscope.circuits.composition import chains as chains
from headscope.circuits.composition import component_composition as component_composition
from headscope.circuits.composition import composition as composition
from headscope.circuits.composition import direction_composition as direction_composition
from headscope.circuits.composition import partners as partners
from headscope.circuits.composition import random_composition as random_composition
from headscope.circuits.composition import strongest_paths as strongest_paths
from headscope.circuits.composition import subspace_affinity as subspace_affinity
from headscope.circuits.decomposition import PromptRecording as PromptRecording
from headscope.circuits.decomposition import ScoreParts as ScoreParts
from headscope.circuits.decomposition import TracedEdge as TracedEdge
from headscope.circuits.decomposition import record as record
from headscope.circuits.decomposition import score_parts as score_parts
from headscope.circuits.decomposition import suppliers as suppliers
from headscope.circuits.decomposition import trace as trace
from headscope.circuits.maps import Mappings as Mappings
from headscope.circuits.maps import TokenRelation as TokenRelation
from headscope.circuits.maps import read_relations as read_relations
from headscope.circuits.maps import relation_scores as relation_scores
from headscope.circuits.maps import relations as relations
from headscope.circuits.maps import salient_mappings as salient_mappings
from headscope.circuits.measures import copying_eigenvalues as copying_eigenvalues
from headscope.circuits.measures import copying_share as copying_share
from headscope.circuits.measures import effective_rank as effective_rank
from headscope.circuits.measures import eigenvalue_ratio as eigenvalue_ratio
from headscope.circuits.measures import marchenko_pastur_edge as marchenko_pastur_edge
from headscope.circuits.measures import matching_eigenvalues as matching_eigenvalues
from headscope.circuits.measures import matching_share as matching_share
from headscope.circuits.measures import outliers as outliers
from headscope.circuits.measures import participation_ratio as participation_ratio
from headscope.circuits.measures import product_edge as product_edge
from headscope.circuits.measures import product_spectra as product_spectra
from headscope.circuits.measures import read_alignment as read_alignment
from headscope.circuits.measures import stable_rank as stable_rank
from headscope.circuits.measures import symmetric_share as symmetric_share
from headscope.circuits.measures import target_ranks as target_ranks
from headscope.circuits.measures import top_share as top_share
from headscope.circuits.measures import write_alignment as write_alignment
from headscope.circuits.ov_qk import HeadFactors as HeadFactors
from headscope.circuits.ov_qk import HeadSVD as HeadSVD
from headscope.circuits.ov_qk import ov as ov
from headscope.circuits.ov_qk import qk as qk
from headscope.circuits.ov_qk import qk_bands as qk_bands
from headscope.circuits.ov_qk import qk_content as qk_content
from headscope.circuits.ov_qk import with_bias as with_bias
from headscope.circuits.scores import Weights as Weights
from headscope.circuits.scores import random_edge as random_edge
from headscope.circuits.scores import score as score
from headscope.circuits.scores import weight_scorers as weight_scorers
from headscope.circuits.survey import Survey as Survey
from headscope.circuits.survey import eigenvalues as eigenvalues
from headscope.circuits.survey import head_card as head_card
from headscope.circuits.survey import spectra as spectra
from headscope.circuits.survey import survey as survey
from headscope.circuits.vocabulary import Dictionary as Dictionary
from headscope.circuits.vocabulary import TopTokens as TopTokens
from headscope.circuits.vocabulary import VocabularyView as VocabularyView
from headscope.circuits.vocabulary import vocabulary_view as vocabulary_view
from headscope.circuits.vocabulary import vocabulary_words as vocabulary_words
from headscope.table import HeadCard as HeadCard
