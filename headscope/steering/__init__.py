"""Steering by heads: task means, indirect effects, injection, contrasts, patchscopes."""

from headscope.steering.effects import SteeringTable as SteeringTable
from headscope.steering.effects import Strengths as Strengths
from headscope.steering.effects import compare as compare
from headscope.steering.effects import contrast as contrast
from headscope.steering.effects import direction as direction
from headscope.steering.effects import indirect_effect as indirect_effect
from headscope.steering.effects import learn_strengths as learn_strengths
from headscope.steering.vectors import HeadReading as HeadReading
from headscope.steering.vectors import HeadVectors as HeadVectors
from headscope.steering.vectors import ResidualVector as ResidualVector
from headscope.steering.vectors import function_vector as function_vector
from headscope.steering.vectors import head_means as head_means
from headscope.steering.vectors import inject as inject
from headscope.steering.vectors import injection as injection
from headscope.steering.vectors import outputs_at as outputs_at
from headscope.steering.vectors import patchscope as patchscope
