"""CALM: completions vote, and winning answers are preferred to losing ones."""
