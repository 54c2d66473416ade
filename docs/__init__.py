"""The documentation's own code; not part of the package."""
