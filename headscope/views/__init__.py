"""What scorers and readers see of a layer: rows, head outputs, queries and keys."""
