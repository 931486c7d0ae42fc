"""Small bugs for `d2l`, each of which would spoil a training run silently, and what a preflight says about each.

`python -m experiments.mutants` plants them one at a time and writes `experiments/mutants.md` and `mutants.json`.
"""
