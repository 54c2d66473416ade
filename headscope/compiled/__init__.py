"""Exact models with known heads: head programs compiled into real GPT-2 and Llama weights.

    made = hs.compiled.induction(rotation_seed=1)
    table = hs.score(made.model, made.probe())
    made.truth.roles                     # {"previous_token": (L0H0,), "induction": (L1H0,)}

The models provide ground truth for testing methods: their patterns, roles, edges and composition
follow from the program, not from the weights.
"""

from headscope.compiled.benchmark import CASES as CASES
from headscope.compiled.benchmark import METHODS as METHODS
from headscope.compiled.benchmark import QUESTIONS as QUESTIONS
from headscope.compiled.benchmark import Benchmark as Benchmark
from headscope.compiled.benchmark import Case as Case
from headscope.compiled.benchmark import Method as Method
from headscope.compiled.benchmark import Question as Question
from headscope.compiled.benchmark import Trial as Trial
from headscope.compiled.benchmark import benchmark as benchmark
from headscope.compiled.benchmark import make_case as make_case
from headscope.compiled.compiled import Build as Build
from headscope.compiled.compiled import Compiled as Compiled
from headscope.compiled.compiled import Truth as Truth
from headscope.compiled.compiled import compiled as compiled
from headscope.compiled.compiled import from_library as from_library
from headscope.compiled.compiled import induction as induction
from headscope.compiled.compiled import program as program
from headscope.compiled.compiled import truth_of as truth_of
from headscope.compiled.library import LIBRARY as LIBRARY
from headscope.compiled.library import induction_program as induction_program
from headscope.compiled.library import ioi_program as ioi_program
from headscope.compiled.library import pointer_program as pointer_program
from headscope.compiled.program import Feature as Feature
from headscope.compiled.program import Head as Head
from headscope.compiled.program import Interpretation as Interpretation
from headscope.compiled.program import Lookup as Lookup
from headscope.compiled.program import Predicate as Predicate
from headscope.compiled.program import Program as Program
from headscope.compiled.program import always as always
from headscope.compiled.program import interpret as interpret
from headscope.compiled.program import offset as offset
from headscope.compiled.program import same as same
from headscope.compiled.program import table as table
from headscope.table.edges import Edge as Edge
