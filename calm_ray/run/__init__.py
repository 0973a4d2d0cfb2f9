"""A run and its storage: files, stages, policies, models, locks, repair."""
