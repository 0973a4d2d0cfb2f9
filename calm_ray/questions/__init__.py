"""Reads questions, checks them and writes them into the run in chunks with the same questions in every language."""
