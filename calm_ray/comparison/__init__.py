"""Compares several methods from one recipe: DCO and the baselines of its Table 1."""
