"""Models seen head by head: loading, attention taps, weights, and verification."""
