"""64 codes and a drifting mixture in the plane: every quantizer's own step, seen code by code. What notebook 10 and the
animation show."""

from experiments.playground.drift import Drift
from experiments.playground.simulation import DEFAULT_METHODS, METHODS, Learner, Observation, Playground, Settings

__all__ = ["DEFAULT_METHODS", "METHODS", "Drift", "Learner", "Observation", "Playground", "Settings"]
