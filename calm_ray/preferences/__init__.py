"""Completions become votes, votes become pairs of a chosen and a rejected completion."""
