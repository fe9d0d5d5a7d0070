"""Our losses against other libraries' (lightly, pytorch-metric-learning, open_clip,
sentence-transformers): the numbers that peer_values.py has stored, values and gradients.

Where a peer computes something else on purpose, its line says what, and the test holds us to it.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.losses import (
    alignment,
    clustering,
    contrastive,
    joint_embedding,
    regularizers,
    whitening,
)
from repalign.numerics import l2_normalize

with np.load(pathlib.Path(__file__).parent / "peer_values.npz") as archive:
    ARRAYS = {name: archive[name] for name in archive.files if name != "meta"}
INPUTS = {
    name.removeprefix("in/"): jnp.asarray(array)
    for name, array in ARRAYS.items()
    if name.startswith("in/")
}
CASES = sorted({name.rsplit("/value")[0] for name in ARRAYS if name.endswith("/value")})

HOT = {"temperature": 0.2}
RANKING = functools.partial(contrastive.info_nce, temperature=0.2)
VICREG = functools.partial(joint_embedding.vicreg, sim=20.0, var=15.0)


def twice_the_coding_rate(a, b):
    """lightly 1.6.0 adds EMP-SSL's coding rate, which the paper and the official code subtract."""
    rates = [regularizers.total_coding_rate(l2_normalize(x)) for x in (a, b)]
    return 2.0 * sum(rates) / 2


def tico(a, b, c, d):
    empty = jnp.zeros((a.shape[1], a.shape[1]))
    covariance = joint_embedding.tico(c, d, empty, beta=0.8, rho=5.0)[1]
    return joint_embedding.tico(a, b, covariance, beta=0.8, rho=5.0)[0]


def dino(s0, s1, s2, t0, t1):
    run = functools.partial(clustering.dino, teacher_temp=0.5)
    center = run([t1, t0], [s1, s2], jnp.zeros(s0.shape[1]))[1]
    return run([t0, t1], [s0, s1, s2], center)[0]


def capi(patches, other_patches):
    assignments = clustering.capi_clustering(other_patches, target_temp=0.4)[1]
    return clustering.capi_prediction(patches, assignments)


def two_dimensional(a, b, c, d, **options):
    return alignment.matryoshka_2d(
        RANKING, jnp.stack([a, b]), jnp.stack([c, d]), prefixes=(3, a.shape[1]), **options
    )


def drawn(compute):
    """Has SIGReg draw the stored directions."""

    def run(*arguments):
        *arrays, directions = arguments
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.random, "normal", lambda key, shape: directions.reshape(shape))
            return compute(*arrays, jax.random.key(0), len(directions))

    return run


OURS = {
    "lightly/nt_xent": (contrastive.nt_xent, HOT),
    "lightly/nt_xent_memory_bank": (
        # The bank alone holds the negatives: without the positive there are no others in the batch.
        lambda a, b, queue: _against_queue(a, b, queue),
        {},
    ),
    "lightly/dcl": (contrastive.dcl, HOT),
    "lightly/dclw": (contrastive.dclw, HOT),
    "lightly/barlow_twins": (joint_embedding.barlow_twins, {"lambda_param": 0.02}),
    "lightly/vicreg": (VICREG, {}),
    "lightly/negative_cosine": (joint_embedding.negative_cosine, {}),
    "lightly/tico": (tico, {}),
    "lightly/mmcr": (
        lambda a, b: joint_embedding.mmcr(
            jnp.stack([l2_normalize(a), l2_normalize(b)], 1),
            jnp.stack([l2_normalize(b), l2_normalize(a)], 1),
            lmda=0.1,
        ),
        {},
    ),
    "lightly/koleo": (regularizers.koleo, {}),
    "lightly/swav": (
        lambda s0, s1, s2: clustering.swapped_assignment([s0, s1], [s2], sinkhorn_epsilon=0.3),
        {},
    ),
    "lightly/swav_queue": (
        lambda s0, s1, t0, t1: clustering.swapped_assignment(
            [s0, s1], [], sinkhorn_epsilon=0.3, queue=[t0, t1]
        ),
        {},
    ),
    "lightly/dino": (dino, {}),
    "lightly/ibot": (
        lambda patches, other_patches, masked: clustering.ibot(
            other_patches, patches, masked, jnp.zeros(patches.shape[2]), teacher_temp=0.3
        )[0],
        {},
    ),
    "lightly/msn": (
        lambda a, prototypes, b: clustering.msn(a[None], b, prototypes)[0],
        {},
    ),
    "lightly/msn_sinkhorn": (
        lambda a, prototypes, b: clustering.msn(a[None], b, prototypes, sinkhorn_iterations=3)[0],
        {},
    ),
    "lightly/capi": (capi, {}),
    "lightly/emp_ssl": (
        lambda a, b: (
            joint_embedding.emp_ssl(jnp.stack([l2_normalize(a), l2_normalize(b)]))
            + twice_the_coding_rate(a, b)
        ),
        {},
    ),
    "lightly/frossl": (joint_embedding.frossl, {}),  # which centres; lightly's is given centred
    "lightly/w_mse": (whitening.w_mse, {"epsilon": 1e-3}),
    "lightly/sigreg": (
        drawn(lambda a, key, count: regularizers.sigreg(a, key, num_slices=count)),
        {},
    ),
    "lightly/lejepa": (
        # With every view a global one; lightly's centre leaves the local views out.
        drawn(
            lambda a, b, key, count: joint_embedding.lejepa(
                jnp.stack([a, b]), key, weight=0.3, num_slices=count
            )
        ),
        {},
    ),
    "lightly/patch_kernel_alignment": (alignment.patch_kernel_alignment, {}),
    "pytorch-metric-learning/sup_con": (contrastive.sup_con, HOT),
    "pytorch-metric-learning/nt_xent": (contrastive.nt_xent, HOT),
    "pytorch-metric-learning/triplet": (
        contrastive.triplet,
        {"margin": 0.5, "distance": "euclidean"},
    ),
    "pytorch-metric-learning/vicreg": (VICREG, {}),
    "open_clip_torch/clip": (
        lambda a, b, logit_scale: contrastive.clip(a, b, logit_scale=logit_scale),
        {},
    ),
    "open_clip_torch/siglip": (
        lambda a, b, logit_scale, bias: contrastive.siglip(
            a, b, scale=jnp.exp(logit_scale), bias=bias
        ),
        {},
    ),
    "sentence-transformers/multiple_negatives_ranking": (RANKING, {}),
    "sentence-transformers/symmetric_ranking": (RANKING, {"symmetric": True}),
    "sentence-transformers/triplet": (
        contrastive.triplet,
        {"margin": 0.5, "distance": "euclidean"},
    ),
    "sentence-transformers/matryoshka": (
        lambda a, b: alignment.matryoshka(
            RANKING, a, b, prefixes=(2, 4, 6), relative_importance=(0.25, 0.5, 1.0)
        ),
        {},
    ),
    "sentence-transformers/matryoshka_2d": (two_dimensional, {"kl_weight": 0}),
    # The gradient to the shallow layers: since 5.2 the peer holds the last one constant.
    "sentence-transformers/matryoshka_2d_divergence": (
        lambda a, c, b, d: two_dimensional(a, b, c, d),
        {},
    ),
}
OTHERS = {
    "lightly/nt_xent_memory_bank": ["queue"],
    "lightly/tico": ["c", "d"],
    "lightly/swav_queue": ["t0", "t1"],
    "lightly/dino": ["t0", "t1"],
    "lightly/ibot": ["other_patches", "masked"],
    "lightly/msn": ["b"],
    "lightly/msn_sinkhorn": ["b"],
    "lightly/capi": ["other_patches"],
    "lightly/sigreg": ["directions"],
    "lightly/lejepa": ["directions"],
    "lightly/patch_kernel_alignment": ["other_patches"],
    "pytorch-metric-learning/sup_con": ["labels"],
    "sentence-transformers/matryoshka_2d_divergence": ["b", "d"],
}


def _against_queue(a, b, queue):
    return jax.vmap(
        lambda query, positive: contrastive.info_nce(
            query[None], positive[None], **HOT, negatives=queue
        )[0]
    )(a, b)


def test_every_peer_is_compared():
    assert sorted(OURS) == CASES
    assert OTHERS.keys() <= OURS.keys()


@pytest.mark.parametrize("name", CASES)
def test_same_as_the_peer(name):
    """Values to 2e-5, gradients to 1e-4 of their largest entry."""
    loss, options = OURS[name]
    prefix = f"{name}/grad/"
    free = [key.removeprefix(prefix) for key in ARRAYS if key.startswith(prefix)]
    others = [INPUTS[key] for key in OTHERS[name]] if name in OTHERS else []

    def mean(*arguments):
        return jnp.mean(loss(*arguments, *others, **options))

    arguments = [INPUTS[key] for key in free]
    value, gradients = jax.jit(jax.value_and_grad(mean, range(len(free))))(*arguments)
    np.testing.assert_allclose(value, ARRAYS[f"{name}/value"], rtol=2e-5)
    for key, gradient in zip(free, gradients, strict=True):
        known = ARRAYS[f"{prefix}{key}"]
        assert np.max(np.abs(gradient - known)) <= 1e-4 * np.max(np.abs(known)), key
