"""Models seen head by head."""
