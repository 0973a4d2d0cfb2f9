"""The demo: a generated world, and a small model that does not get at all of it in every language."""
