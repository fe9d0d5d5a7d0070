"""Losses that let a new model's embeddings be compared with an old model's gallery."""

import jax
import jax.numpy as jnp
from jax import lax

from repalign.kernels.contrastive.api import log_sum_exp
from repalign.numerics import as_float, cosine_similarity
from repalign.registry import lookup
from repalign.typing import Array, ArrayLike, Float, Integer, Num


def orthogonal_matrix(parameters: Num[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    """Returns the rotation ``exp(S - S^T)`` of free parameters S; the identity at S = 0.

    Orthogonal transformations keep all distances, so a new embedding may be rotated towards the
    old one's axes without loss. Differentiable. Source: the parametrisation of Lezcano-Casado &
    Martinez-Rubio (arXiv:1901.08428); YifeiZhou02/BT-2@8282360:models/resnet.py:80-104 uses
    torch's ``orthogonal`` for the same purpose.
    """
    parameters = as_float(parameters)
    return jax.scipy.linalg.expm(parameters - parameters.T)


def old_prefix_cosine(
    new: Num[Array, "batch new_dim"], old: Num[Array, "batch old_dim"]
) -> Float[Array, "batch"]:
    """``1 - cos(new_i[:d_old], old_i)`` per example, in [0, 2]; the old side gets no gradient.

    The new embedding keeps d_old dimensions for compatibility and the rest for what the old model
    did not know. Source: Zhou et al., BT^2 (arXiv:2211.03989), the matching terms;
    YifeiZhou02/BT-2@8282360:trainers/transfer_trainer.py:90-93.

    Raises:
        ValueError: the new embedding is narrower than the old one.
    """
    if new.shape[1] < old.shape[1]:
        raise ValueError(
            f"the new embedding has {new.shape[1]} dimensions, fewer than the old {old.shape[1]}; "
            "it must contain the old space as its first dimensions."
        )
    return 1.0 - cosine_similarity(new[:, : old.shape[1]], lax.stop_gradient(old))


def higher_order_compatibility(
    new: Num[Array, "batch dim"],
    old: Num[Array, "batch dim"],
    labels: Integer[Array, "batch"],
    *,
    mu: ArrayLike = 10.0,
    same_class: str = "excluded",
) -> Float[Array, "batch"]:
    """``-mu <old_i, new_i> + log sum_{j: y_j != y_i} exp(mu <old_i, new_j>)`` per example.

    Inputs are taken as they are (the paper's are unit-norm). The old side gets no gradient. The
    sums are streamed for large batches as in ``losses.contrastive``.

    Args:
        same_class: ``excluded`` leaves examples of the same class out of the sum, as the paper's
            equation does; ``zeroed`` keeps each of them as exp(0) = 1, as the released code does.
            With ``excluded``, an example without any other class has only the first term.

    Raises:
        UserError: another name for ``same_class``.

    Source: Biondi et al. (arXiv:2405.02581); miccunifi/iamcl2r@18495ac:
    src/iamcl2r/methods/hoc.py:49-65.
    """
    zeroed = lookup({"excluded": False, "zeroed": True}, same_class, kind="same_class")
    old, new = lax.stop_gradient(as_float(old)), as_float(new)
    positives = mu * jnp.sum(old * new, axis=1)
    negatives = log_sum_exp(old, new, scale=mu, exclude=(labels, labels))
    in_order = jnp.sort(labels)
    same = jnp.searchsorted(in_order, labels, side="right") - jnp.searchsorted(in_order, labels)
    if zeroed:
        return jnp.logaddexp(negatives, jnp.log(same.astype(old.dtype))) - positives
    any_different = same < labels.shape[0]
    return jnp.where(any_different, negatives, 0.0) - positives
