"""Bytes of one layer's experts, or of its dense MLP, counted from what each way to compute them saves and makes.

Shape legend: T = tokens, R = routes: T times the experts that a token goes through, E = experts of a layer, H = hidden and
I = intermediate size.
"""

from d2l.base.grouped import slices
from d2l.plan.sizes import Sizes

_INT64 = 8
# Copies of [R, slice of I] in d2l.base.grouped: the activation's forward, and its recomputed forward with its backward.
_ACTIVATION_FORWARD, _ACTIVATION_BACKWARD = 5, 8


def expert_transient(sizes: Sizes) -> int:
    """Return the bytes of packed experts that are dequantized at once: a slice of a layer's, or one expert's."""
    base = sizes.base
    if sizes.experts_path == "grouped":
        return max(width * column for width, column in _slices(sizes))
    return base.expert_weights * sizes.element if sizes.experts_path == "one_by_one" else 0


def mlp_forward_bytes(sizes: Sizes, tokens: int) -> int:
    """Return the bytes at work in the forward."""
    base, size = sizes.base, sizes.element
    routes = tokens * base.routes
    if sizes.experts_path != "grouped":
        values = _routes_at_once(sizes, routes) * (8 * base.intermediate + 2 * base.hidden)
        return (values + 2 * tokens * base.hidden) * size + expert_transient(sizes)
    (inner, inner_column), (outer, outer_column), _ = _slices(sizes)
    both = 2 * base.intermediate
    projecting = routes * (base.hidden + both + 2 * inner) * size + inner * inner_column
    activating = routes * (both + base.intermediate + (_ACTIVATION_FORWARD - 1) * inner) * size
    mixing = routes * (both + base.intermediate + 2 * outer) * size + outer * outer_column
    return max(projecting, activating, mixing) + tokens * base.hidden * size


def mlp_kept_bytes(sizes: Sizes, tokens: int) -> int:
    """Return what is kept for the backward.

    Grouped experts keep gate and up of a route, and its places. Else experts keep gate and up, the SwiGLU's values and
    the output of a route; a dense MLP gate, up, the activated gate and the product.
    """
    base = sizes.base
    routes = tokens * base.routes
    if sizes.experts_path == "grouped":
        return routes * (2 * base.intermediate * sizes.element + 4 * _INT64)
    values = 6 * base.intermediate + base.hidden if base.experts else 4 * base.intermediate
    return routes * values * sizes.element


def mlp_backward_bytes(sizes: Sizes, tokens: int) -> int:
    """Return the bytes at work in the backward, beside what was kept."""
    base, size = sizes.base, sizes.element
    routes = tokens * base.routes
    if sizes.experts_path != "grouped":
        values = _routes_at_once(sizes, routes) * (4 * base.intermediate + base.hidden)
        return values * size + expert_transient(sizes)
    (inner, inner_column), _, (outer, outer_column) = _slices(sizes)
    both = 2 * base.intermediate
    activating = routes * (base.hidden + both + _ACTIVATION_BACKWARD * inner) * size + inner * inner_column // 2
    projecting = routes * (both + 2 * outer) * size + outer * outer_column
    return max(activating, projecting)


def _routes_at_once(sizes: Sizes, routes: int) -> int:
    """Return the routes of one expert, if they are dealt out evenly."""
    return routes // max(1, sizes.base.experts)


def _slices(sizes: Sizes) -> tuple[tuple[int, int], ...]:
    """Return the widest slice and the bytes of a column of all experts: of gate and up, of down, and of both by their inputs."""
    base = sizes.base
    weights = base.experts * sizes.element
    wanted = (
        (base.intermediate, 2 * weights * base.hidden),
        (base.hidden, weights * base.intermediate),
        (base.hidden, 2 * weights * base.intermediate),
    )
    return tuple(
        (max(_width(it) for it in slices(*each, sizes.load.expert_transient_bytes)), each[1]) for each in wanted
    )


def _width(columns: slice) -> int:
    width: int = columns.stop - columns.start
    return width
