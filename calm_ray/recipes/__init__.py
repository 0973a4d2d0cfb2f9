"""The recipes that come with calm_ray, and how recipes are found, merged and validated."""
