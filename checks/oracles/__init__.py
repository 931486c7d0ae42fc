"""Oracles: plain, slow float64 formulas, against which checks and tests compare an implementation.

Nothing here imports d2l or the rest of `checks`: what is judged cannot bend what it is judged by. Each formula names
its source. Other notation: T = tokens, V = vocabulary, L = decoder layers, r = rank of a chunk, R = rank of a merged LoRA.
"""
