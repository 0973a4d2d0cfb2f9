"""DCO: each language learns to weigh candidates as all languages together do."""
