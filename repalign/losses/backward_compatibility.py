"""Losses that let a new model's embeddings be compared with an old model's gallery."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from repalign.kernels.contrastive.api import log_sum_exp
from repalign.numerics import as_float, cosine_similarity, l2_normalize
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


def basis_transformation(
    new: Num[Array, "batch new_dim"],
    old: Num[Array, "batch old_dim"],
    new_basis: Num[Array, "new_dim new_dim"],
    old_basis: Num[Array, "old_dim old_dim"],
    shared_basis: Num[Array, "new_dim new_dim"],
    *,
    extra: int,
) -> tuple[Float[Array, "batch new_dim"], Float[Array, "batch {extra}"]]:
    """BT^2: spreads an old and a new embedding over a compatible part and ``extra`` dimensions.

    ``u = [h_old O_{1:extra}^T / |.|, h_new N^T]``; the compatible part is ``u_{1:d} S^T``, with d
    the new width, and the rest of u the extra dimensions. All three matrices are orthogonal (see
    ``orthogonal_matrix``), so that nothing of the new embedding is lost: the compatible part can
    follow the old one (``old_prefix_cosine``) while the extra part holds what is new. Every input
    receives gradients; freeze the old embedding outside.

    Raises:
        ValueError: ``extra`` is not between 1 and the smaller width.

    Source: Zhou et al., BT^2 (arXiv:2211.03989); YifeiZhou02/BT-2@8282360:models/resnet.py:80-104
    (``BasisChange``, there for two embeddings of one width).
    """
    width = new.shape[1]
    if not 1 <= extra <= min(width, old.shape[1]):
        raise ValueError(
            f"extra={extra} must be between 1 and the smaller of the widths {width} (new) and "
            f"{old.shape[1]} (old)."
        )

    def rotate(x: Array, basis: Array) -> Array:
        return jnp.matmul(as_float(x), as_float(basis).T, precision=lax.Precision.HIGHEST)

    both = jnp.concatenate(
        [l2_normalize(rotate(old, old_basis[:extra])), rotate(new, new_basis)], axis=1
    )
    return rotate(both[:, :width], shared_basis), both[:, width:]


def simplex_classifier(classes: int) -> Float[np.ndarray, "classes {classes-1}"]:
    """Returns the corners of a regular simplex: the fixed weights of a classifier without bias.

    Unit rows, each at ``-1 / (classes - 1)`` to every other. A model trained with the cross-entropy
    of ``embedding @ weights.T`` keeps a class in its direction whenever it is retrained; classes
    not yet seen have theirs reserved (1,024 in the released configuration).

    Raises:
        ValueError: fewer than two classes.

    Source: Biondi et al., CoReS (arXiv:2111.07632) and d-Simplex-HOC (arXiv:2405.02581);
    miccunifi/iamcl2r@18495ac:src/iamcl2r/models/__init__.py:107-119.
    """
    if classes < 2:
        raise ValueError(f"a simplex needs at least two classes, got {classes}.")
    width = classes - 1
    last = np.full((1, width), (1.0 - np.sqrt(1.0 + width)) / width)
    corners = np.concatenate([np.eye(width), last])
    corners -= corners.mean(axis=0)
    return (corners / np.linalg.norm(corners, axis=1, keepdims=True)).astype(np.float32)


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


def old_prototype_cross_entropy(
    new: Num[Array, "batch new_dim"],
    prototypes: Num[Array, "batch classes old_dim"],
    labels: Integer[Array, "batch"],
    *,
    scale: ArrayLike = 30.0,
) -> Float[Array, "batch"]:
    """``-log softmax_c(scale cos(new_i[:d_old], p_ic))[y_i]`` per example; class c has prototype p.

    The prototypes, the old model's mean embedding of each class, are a fixed classifier of the new
    embedding's first dimensions: images of a class shall be nearest to that class as the old model
    sees it. They are given for each example, the same for all of a run. No gradient for them.

    Raises:
        ValueError: the new embedding is narrower than the prototypes.

    Source: the influence loss of Shen et al. 2020 (arXiv:2003.11942), whose classifier
    of the old space has synthesized weights, mean old embeddings; there without normalisation.
    """
    old_dim = prototypes.shape[-1]
    if new.shape[1] < old_dim:
        raise ValueError(
            f"the new embedding has {new.shape[1]} dimensions, fewer than the prototypes' "
            f"{old_dim}."
        )
    unit = l2_normalize(new[:, :old_dim])
    fixed = lax.stop_gradient(l2_normalize(prototypes))
    logits = scale * jnp.einsum("bd,bcd->bc", unit, fixed, precision=lax.Precision.HIGHEST)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
