"""calm_ray: a language model learns, without labels, to agree with its better self across languages."""

__version__ = "0.1.0"
