"""CALM: rounds of self-alignment. Without arguments, the demo.

python jobs/calm.py
python jobs/calm.py my-recipe.yaml train.learning_rate=5e-6 rounds=3
ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/calm.py my-recipe.yaml
"""

from calm_ray.cli import align_job

if __name__ == "__main__":
    align_job("demo")
