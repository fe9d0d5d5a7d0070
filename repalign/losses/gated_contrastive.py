"""Contrastive learning of arbitrary pairs inside the subspace that a gate opens for the pair."""

import jax
import jax.numpy as jnp
from jax import lax

from repalign.numerics import as_float, inner_products, map_row_blocks
from repalign.typing import Array, ArrayLike, Float, Integer, Num


def pair_gated_info_nce(
    embeddings: Num[Array, "batch dim"],
    gates: Num[Array, "batch dim"],
    labels: Integer[Array, "batch"],
    positive_labels: Integer[Array, "batch"],
    *,
    temperature: ArrayLike = 0.1,
) -> Float[Array, "batch"]:
    """InfoNCE between two classes, compared only in the dimensions that the pair's gate lets pass.

    ``s_ij = cos(g_i z_i, g_i z_j) / temperature``; anchor i attracts the examples p of the class
    ``positive_labels[i]``, any class, and repels those of neither class:
    ``mean_p log(exp(s_ip) + sum_n exp(s_in)) - s_ip``. An anchor without a positive in the batch
    has loss 0. Where both classes are the same, the anchor is one of its own positives, as in the
    official code. Every example is an anchor; the gates receive gradients. Two matrix products, no
    gated copies; large batches go by blocks of rows.

    Args:
        embeddings: z.
        gates: g in [0, 1], of the anchor's class and the other; in the paper
            ``sigmoid(MLP((e_y + e_y') / 2))`` with a learned embedding e of the classes.
        labels: the classes of the examples.
        positive_labels: the class that each anchor is paired with; drawn from the batch's labels
            (``arbitrary``), or the anchor's own.

    The official loss is the mean over all positive pairs of the batch: the mean of this one
    weighted by each anchor's number of positives.

    Source: Wu et al., Rethinking Positive Pairs in Contrastive Learning (arXiv:2410.18200), with
    its SimLAP training file (class ``SimLAP``, ``disparate_loss`` and ``multipos_ce_loss``), which
    was read in a copy that names no commit.
    """
    z = as_float(embeddings)
    squares = jnp.square(z)

    def anchors(rows: tuple[Array, Array, Array, Array]) -> Array:
        own, gate, label, positive_label = rows
        passed = jnp.square(gate)
        norms = jnp.sum(passed * jnp.square(own), axis=1)[:, None] * inner_products(passed, squares)
        some = norms > jnp.finfo(z.dtype).tiny
        scale = jnp.where(some, lax.rsqrt(jnp.where(some, norms, 1.0)), 0.0)
        scores = inner_products(passed * own, z) * scale / temperature
        positives = positive_label[:, None] == labels
        negatives = ~positives & (label[:, None] != labels)
        any_negative = jnp.any(negatives, axis=1, keepdims=True)
        # Without negatives the sum runs over everything and is not used: no NaN gradient.
        total = jax.nn.logsumexp(scores, axis=1, keepdims=True, where=negatives | ~any_negative)
        cost = jnp.where(any_negative, jax.nn.softplus(total - scores), 0.0)
        count = jnp.maximum(jnp.sum(positives, axis=1), 1)
        return jnp.sum(jnp.where(positives, cost, 0.0), axis=1) / count

    rows = (z, as_float(gates), labels, positive_labels)
    return map_row_blocks(anchors, rows, columns=z.shape[0])
