"""A run on its storage: files, stages, policies, models, locks, repair."""
