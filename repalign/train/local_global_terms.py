"""Terms that contrast summaries of images with local features of their maps."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from repalign.losses import mutual_information
from repalign.registry import UserError
from repalign.train.objective import Term, TermOutput
from repalign.typing import Array, Features, Float, Key, PyTree


def local_global(
    *,
    pairs: Sequence[tuple[str, str]],
    score_clip: float = 20.0,
    score_penalty: float = 0.04,
    name: str = "local_global",
) -> Term:
    """AMDIM's infomax between scales; see `repalign.losses.mutual_information.local_global_nce`.

    The sum over pairs of features of the loss and ``score_penalty`` times the squared scores. AMDIM
    has the pairs (global, fine), (global, coarse) and (coarse, coarse) of two views in both
    directions, each at half weight; both features of one view make it Deep InfoMax; two global
    ones, each with the one location that it has, contrast the views as a whole.

    Args:
        pairs: for each contrast the feature that predicts and the one whose locations it has to
            find. The first is a vector [batch, dim], or a map [batch, height, width, dim] of which
            each image gives one vector, drawn anew in every step; the second a map, or a vector.
        score_clip: bound of the scores; the official default is 20.
        score_penalty: weight of the mean squared score before clipping.
        name: the name of the term.

    Raises:
        UserError: no pairs.

    Source: Bachman et al. 2019 (arXiv:1906.00910), section 3;
    Philip-Bachman/amdim-public@0333f6b:costs.py (LossMultiNCE).
    """
    pairs = [tuple(pair) for pair in pairs]
    if not pairs:
        raise UserError(f"objective.{name}.pairs: there has to be at least one pair.")

    def apply(params: PyTree, state: PyTree, features: Features, key: Array) -> TermOutput:
        del params
        total, penalty = 0.0, 0.0
        for number, (source, target) in enumerate(pairs):
            summary = features[source]
            if summary.ndim == 4:
                summary = one_location(jax.random.fold_in(key, number), summary)
            found = features[target]
            local = found.reshape(len(found), -1, found.shape[-1])
            output = mutual_information.local_global_nce(summary, local, score_clip=score_clip)
            total, penalty = total + output.loss, penalty + output.score_penalty
        metrics = {"squared_score": jnp.mean(penalty) / len(pairs)}
        return TermOutput(total + score_penalty * penalty, state, metrics)

    return Term(name, apply)


def one_location(
    key: Key[Array, ""], maps: Float[Array, "batch height width dim"]
) -> Float[Array, "batch dim"]:
    """Returns the vector of each map at a place of its own, uniform over all of them."""
    rows = maps.reshape(len(maps), -1, maps.shape[-1])
    chosen = jax.random.randint(key, (len(rows), 1, 1), 0, rows.shape[1])
    return jnp.take_along_axis(rows, chosen, axis=1)[:, 0]
