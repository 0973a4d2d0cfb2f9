"""Evaluates a policy on held-out questions: metrics, reports and tables."""
