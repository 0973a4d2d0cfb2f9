"""Questions in: read, checked, and written into the run in chunks that hold the same questions in every language."""
