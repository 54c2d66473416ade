"""Heads of one model beside those of another, or beside themselves earlier in training."""

from headscope.comparing.compared import compare as compare
from headscope.comparing.emerging import emergence as emergence
