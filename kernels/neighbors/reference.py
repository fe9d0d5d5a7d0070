"""The definition of exact nearest neighbours: all scores at once, then a stable sort."""

import jax.numpy as jnp
from jax import Array, lax


def scores(queries: Array, database: Array, *, metric: str) -> Array:
    """Returns the ``[queries, database]`` scores, larger is nearer, in float32 (or float64).

    ``inner_product``: ``<q, x>``. ``euclidean``: ``-|q - x|^2``, clipped above at 0, up to the
    rounding of the expanded form ``|q|^2 - 2<q, x> + |x|^2``; shift both sets to the origin first
    (``centered``), or that rounding is as large as the squared distance to the origin.
    """
    products = jnp.matmul(queries, database.T, precision=lax.Precision.HIGHEST)
    if metric == "inner_product":
        return products
    query_norms, database_norms = squared_norms(queries), squared_norms(database)
    return jnp.minimum(2.0 * products - query_norms[:, None] - database_norms[None, :], 0.0)


def squared_norms(points: Array) -> Array:
    """Returns ``|x|^2`` of every row."""
    return jnp.sum(jnp.square(points), axis=1)


def centered(queries: Array, database: Array, *, metric: str) -> tuple[Array, Array]:
    """Moves both sets by the mean of the database when the metric does not see a common shift."""
    if metric == "inner_product":
        return queries, database
    center = jnp.mean(database, axis=0)
    return queries - center, database - center


def top_k(
    queries: Array, database: Array, *, k: int, metric: str, exclude_self: bool
) -> tuple[Array, Array]:
    """Returns (scores, indices), both ``[queries, k]``, nearest first; see ``api.top_k``."""
    all_scores = scores(*centered(queries, database, metric=metric), metric=metric)
    if exclude_self:
        same = jnp.arange(queries.shape[0])[:, None] == jnp.arange(database.shape[0])[None, :]
        all_scores = jnp.where(same, -jnp.inf, all_scores)
    indices = jnp.argsort(all_scores, axis=1, stable=True, descending=True)[:, :k]
    return jnp.take_along_axis(all_scores, indices, axis=1), indices.astype(jnp.int32)
