"""Builds prompts from questions and parses the answers."""
