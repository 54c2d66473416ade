"""Results: one score for every head, all scores of a model, and scores of pairs of heads."""

from headscope.table.attention import AttentionExample as AttentionExample
from headscope.table.attribution import Attribution as Attribution
from headscope.table.card import HeadCard as HeadCard
from headscope.table.comparison import Comparison as Comparison
from headscope.table.curve import OrderCurve as OrderCurve
from headscope.table.effects import EffectGrid as EffectGrid
from headscope.table.emergence import Emergence as Emergence
from headscope.table.lens import HeadWords as HeadWords
from headscope.table.lens import LensGrid as LensGrid
from headscope.table.losses import TokenLosses as TokenLosses
from headscope.table.pairs import PairScores as PairScores
from headscope.table.provenance import Provenance as Provenance
from headscope.table.provenance import versions as versions
from headscope.table.recall import RecallGrid as RecallGrid
from headscope.table.roles import RoleFinding as RoleFinding
from headscope.table.scores import HeadScores as HeadScores
from headscope.table.spectra import HeadEigenvalues as HeadEigenvalues
from headscope.table.spectra import HeadSpectra as HeadSpectra
from headscope.table.spectra_file import load_spectra as load_spectra
from headscope.table.spectra_file import save_spectra as save_spectra
from headscope.table.summary import Summary as Summary
from headscope.table.table import HeadTable as HeadTable
