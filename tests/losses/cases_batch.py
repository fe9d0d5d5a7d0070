"""Cases of the joint-embedding, whitening, regularising and clustering losses."""

import jax
import jax.numpy as jnp
from case_table import (
    ALONE,
    MIXED,
    NORMALISED,
    PROTOTYPES,
    SPREAD,
    WIDTH,
    case,
    decided,
    key,
    labels,
    one,
    plain,
    queue,
    token_mask,
    tokens,
)

from repalign.losses import (
    clustering,
    correlation,
    equivariance,
    joint_embedding,
    regularizers,
    whitening,
)
from repalign.numerics import as_float

plain("negative_cosine", joint_embedding.negative_cosine, **NORMALISED, **ALONE)
for name, of in (("byol", joint_embedding.byol), ("simsiam", joint_embedding.simsiam)):
    case(
        name,
        of,
        lambda a, b, ids, where, of=of: of(a, a[:, MIXED[1]], b, b[:, MIXED[2]]),
        scale="rows",
        fixed="b",
        **ALONE,
    )
plain("barlow_twins", joint_embedding.barlow_twins)
plain("vicreg", joint_embedding.vicreg)
for detach in (True, False):
    case(
        "tico" if detach else "tico/through",
        joint_embedding.tico,
        lambda a, b, ids, where, detach=detach: joint_embedding.tico(
            a, b, jnp.asarray(SPREAD, decided(a)), detach=detach, where=where
        )[0],
        scale="rows",
        stops=detach,
    )
case(
    "mmcr",
    joint_embedding.mmcr,
    lambda a, b, ids, where: joint_embedding.mmcr(a[:, None], b[:, None], where=where),
    rotation=True,
)
plain("frossl", joint_embedding.frossl)
case(
    "emp_ssl",
    joint_embedding.emp_ssl,
    lambda a, b, ids, where: joint_embedding.emp_ssl(jnp.stack([a, b]), where=where),
    rotation=True,
)
case(
    "lejepa",
    joint_embedding.lejepa,
    lambda a, b, ids, where: joint_embedding.lejepa(
        jnp.stack([a, b]), key(), weight=0.3, num_slices=8, where=where
    ),
)
case(
    "transform_prediction",
    joint_embedding.transform_prediction,
    lambda a, b, ids, where: joint_embedding.transform_prediction(a, labels(ids)),
    fixed="b",
    **ALONE,
)
plain("w_mse", whitening.w_mse)
one("trace_loss", whitening.trace_loss)
for kind in ("batch", "channel"):
    plain(f"intl/{kind}", whitening.intl, options={"whitening": kind, "trade_off": 0.1})
one("koleo", regularizers.koleo, **NORMALISED)
one("von_neumann_entropy", regularizers.von_neumann_entropy, **NORMALISED)
one("total_coding_rate", regularizers.total_coding_rate, rotation=True)
case(
    "sigreg",
    regularizers.sigreg,
    lambda a, b, ids, where: regularizers.sigreg(a, key(), num_slices=8, where=where),
    fixed="b",
)
one("dispersive", regularizers.dispersive, rotation=True)
plain("cka_loss", correlation.cka_loss, scale="whole", rotation=True)
plain("cca_loss", correlation.cca_loss, rotation=True)

case(
    "sinkhorn",
    clustering.sinkhorn,
    lambda a, b, ids, where: jnp.sum(
        clustering.sinkhorn(a, epsilon=0.5, where=where) * jnp.arange(WIDTH), axis=1
    ),
    fixed="b",
)
case(
    "swapped_assignment",
    clustering.swapped_assignment,
    lambda a, b, ids, where: clustering.swapped_assignment(
        [a, b], [], sinkhorn_epsilon=0.5, where=where
    ),
    stops=True,
)
case(
    "swapped_assignment/queue",
    clustering.swapped_assignment,
    lambda a, b, ids, where: clustering.swapped_assignment(
        [b], [a], sinkhorn_epsilon=0.5, queue=[queue(a)], where=where
    ),
    fixed="b",
)
case(
    "dino",
    clustering.dino,
    lambda a, b, ids, where: clustering.dino(
        [b], [a, a[:, MIXED[1]]], jnp.zeros(WIDTH, a.dtype), teacher_temp=0.5, where=where
    )[0],
    fixed="b",
    **ALONE,
)
case(
    "ibot",
    clustering.ibot,
    lambda a, b, ids, where: clustering.ibot(
        tokens(b), tokens(a), token_mask(a, None), jnp.zeros(WIDTH, a.dtype), teacher_temp=0.5
    )[0],
    fixed="b",
    **ALONE,
)
case(
    "msn",
    clustering.msn,
    lambda a, b, ids, where: clustering.msn(
        jnp.stack([a, a[:, MIXED[1]]]), b, jnp.asarray(PROTOTYPES, decided(a)), where=where
    )[0],
    scale="rows",
    fixed="b",
)
for positionwise in (True, False):
    case(
        "capi_clustering" if positionwise else "capi_clustering/together",
        clustering.capi_clustering,
        lambda a, b, ids, where, positionwise=positionwise: clustering.capi_clustering(
            tokens(a), target_temp=0.6, positionwise=positionwise
        )[0],
        fixed="b",
        stops=True,
    )
case(
    "capi_prediction",
    clustering.capi_prediction,
    lambda a, b, ids, where: clustering.capi_prediction(
        tokens(a), jax.nn.softmax(as_float(tokens(b)), axis=-1), where=token_mask(a, where)
    ),
    fixed="b",
    **ALONE,
)

case(
    "split_invariant_equivariant",
    equivariance.split_invariant_equivariant,
    lambda a, b, ids, where: equivariance.split_invariant_equivariant(
        a[:, :4], b[:, :4], a[:, 4:], b[:, 4:], a[:, 4:] + a[:, :4], where=where
    ),
)
plain("orthogonal_equivariance", equivariance.orthogonal_equivariance, rotation=True)
for hinge in ("vector", "element"):
    case(
        f"counting/{hinge}",
        equivariance.counting,
        lambda a, b, ids, where, hinge=hinge: equivariance.counting(
            a, tokens(b), a[:, ::-1], margin=200.0, hinge=hinge
        ),
        **ALONE,
    )
