"""Steps that methods share: sampling, candidates' scores, training, evaluation."""
