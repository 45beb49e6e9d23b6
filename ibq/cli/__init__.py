"""Command line of the method: reconstruct, evaluate, sample."""
