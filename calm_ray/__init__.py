"""calm_ray: cross-lingual alignment of language models without labels."""

__version__ = "0.1.0"
