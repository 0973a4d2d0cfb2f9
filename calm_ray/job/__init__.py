"""A run from its recipe to its rounds: checks, questions, engines, rounds, summary."""
