from small_runs import babbler, cache, make_recipe, question_files, ray_8_cpus

__all__ = ["babbler", "cache", "make_recipe", "question_files", "ray_8_cpus"]
