"""Foundations: values and small functions that do not know any model."""
