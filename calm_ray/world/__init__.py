"""The embedded demo: a small multilingual world, generated from a seed, and its own small model."""
