"""Prompts and their continuations in one row without padding, and attention that keeps them apart."""
