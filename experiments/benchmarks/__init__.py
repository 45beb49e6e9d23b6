"""Benchmarks: measured side by side in one run, each cell in a process of its own, never as a timed test."""
