"""Geometry of hidden states: how layers and heads spread, curve and carry what they hold."""
