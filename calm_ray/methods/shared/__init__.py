"""Steps shared by several methods: sampling, scoring, training, evaluation."""
