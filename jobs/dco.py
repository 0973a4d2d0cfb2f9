"""DCO: rounds of direct consistency optimization. Without arguments, the demo.

python jobs/dco.py
python jobs/dco.py 'dco/tables:table1[aya,dco]' dco.anchor.language=en dco.anchor.strength=10
ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/dco.py 'dco/tables:table1[aya,dco]'
"""

from calm_ray.cli import align_job

if __name__ == "__main__":
    align_job("dco/demo")
