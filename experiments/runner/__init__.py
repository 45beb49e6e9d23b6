"""Sweeps: worker processes, torchrun, plans, and commands on single runs."""
