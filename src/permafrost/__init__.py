"""Explainability-guided filter freezing against catastrophic forgetting."""
