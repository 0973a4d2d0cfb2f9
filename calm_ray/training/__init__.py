"""Pairs become a trained policy."""
