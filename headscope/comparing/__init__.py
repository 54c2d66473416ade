"""Heads of one model beside those of another, or beside themselves earlier in training."""

from headscope.comparing.compare import compare as compare
from headscope.comparing.emergence import emergence as emergence
