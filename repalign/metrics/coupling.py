"""How much of a contrastive gradient the softmax over positive and negatives lets through."""

import jax.numpy as jnp

from repalign.losses.contrastive import nt_xent
from repalign.typing import Array, ArrayLike, Bool, Float


def negative_positive_coupling(
    a: Float[Array, "batch dim"],
    b: Float[Array, "batch dim"],
    *,
    temperature: ArrayLike,
    where: Bool[Array, "batch"] | None = None,
) -> Float[Array, "anchors"]:
    """DCL's multiplier ``q_B``: by what NT-Xent's gradient at an anchor is smaller than DCL's.

    ``q_B,i = 1 - e^{cos(z_i, z_i+)/t} / sum_{j != i} e^{cos(z_i, z_j)/t}``: one less the
    probability of the positive, in [0, 1]. The gradient of an anchor's NT-Xent with respect to that
    anchor is ``q_B,i`` times that of its DCL: it vanishes where the positive is easy to tell from
    the negatives of a small batch.

    Args:
        a: [N, D], first views; normalised inside.
        b: [N, D], second views.
        temperature: positive scalar.
        where: [N]; examples to use. A masked one gives 0.

    Returns:
        [2N]: the anchors of ``a``, then those of ``b``.

    Source: Yeh et al. 2021 (DCL), proposition 1.
    """
    return -jnp.expm1(-nt_xent(a, b, temperature=temperature, where=where))
