"""The demo: a generated world, and a small model that cannot recall all of it in every language."""
