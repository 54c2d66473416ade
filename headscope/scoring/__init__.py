"""``hs.score``: every scorer on every head, in shared passes."""

from headscope.scoring.score import score as score
