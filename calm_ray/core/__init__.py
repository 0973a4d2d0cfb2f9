"""What everything else builds on: rows, recipe sections, languages, errors, the console."""
