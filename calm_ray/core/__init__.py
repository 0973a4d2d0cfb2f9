"""Rows, sections of a recipe, languages, errors, the console: what everything else stands on."""
