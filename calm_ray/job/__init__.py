"""Takes a run from its recipe through its rounds: checks, questions, engines, rounds, summary."""
