"""Evaluation of trained tokenizers and transformers, and the diagnosis of a run."""
