"""Effects, verdicts, findings, diagnoses and projections, computed from rows and run directories."""
