"""Several methods from one recipe, side by side, as in DCO's Table 1. Without arguments, the demo.

python jobs/compare.py
python jobs/compare.py my-recipe.yaml --methods base sft_gold dpo_gold calm 'dpo_gold->dco' dco
ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/compare.py my-recipe.yaml
"""

import sys

from calm_ray.comparison.main import main

if __name__ == "__main__":
    sys.exit(main())
