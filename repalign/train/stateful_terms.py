"""Terms that keep something from step to step: queues, centres, covariances; or learn something of
their own: prototypes, the scale of the logits.

The losses themselves are pure and take it as an argument; here lie its start and its renewal.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from repalign.losses import clustering, contrastive, hard_negatives, joint_embedding
from repalign.metrics import codebook
from repalign.numerics import inner_products, l2_normalize
from repalign.registry import UserError
from repalign.train.objective import Term, TermOutput
from repalign.typing import Array, Features, Float, PyTree


def tico(
    *,
    a: str,
    b: str,
    beta: float = 0.9,
    rho: float = 8.0,
    detach: bool = True,
    name: str = "tico",
) -> Term:
    """TiCo with its running covariance as state; see `repalign.losses.joint_embedding.tico`.

    Args:
        a: feature [batch, dim], the trained network's embeddings.
        b: feature [batch, dim], the averaged network's.
        beta, rho, detach: as in the loss.
        name: the name of the term.
    """

    def init(key: Array, features: Features) -> tuple[PyTree, PyTree]:
        del key
        dim = features[a].shape[-1]
        return {}, {"covariance": jnp.zeros((dim, dim), jnp.float32)}

    def apply(params: PyTree, state: PyTree, features: Features, key: Array) -> TermOutput:
        del params, key
        loss, covariance = joint_embedding.tico(
            features[a], features[b], state["covariance"], beta=beta, rho=rho, detach=detach
        )
        return TermOutput(loss, {"covariance": covariance}, {})

    return Term(name, apply, init)


def dino(
    *,
    teacher: Sequence[str],
    student: Sequence[str],
    teacher_temp: float = 0.04,
    student_temp: float = 0.1,
    center_momentum: float = 0.9,
    name: str = "dino",
) -> Term:
    """DINO with its centre as state; see `repalign.losses.clustering.dino`.

    Args:
        teacher: features [batch, classes], scores of the averaged network for the large views.
        student: features [batch, classes], of the trained network for all views, in that order.
        teacher_temp, student_temp, center_momentum: as in the loss.
        name: the name of the term.
    """

    def init(key: Array, features: Features) -> tuple[PyTree, PyTree]:
        del key
        return {}, {"center": jnp.zeros(features[teacher[0]].shape[-1], jnp.float32)}

    def apply(params: PyTree, state: PyTree, features: Features, key: Array) -> TermOutput:
        del params, key
        loss, center = clustering.dino(
            [features[view] for view in teacher],
            [features[view] for view in student],
            state["center"],
            teacher_temp=teacher_temp,
            student_temp=student_temp,
            center_momentum=center_momentum,
        )
        return TermOutput(loss, {"center": center}, {})

    return Term(name, apply, init)


def ibot(
    *,
    teacher: str,
    student: str,
    masked: str,
    teacher_temp: float = 0.04,
    student_temp: float = 0.1,
    center_momentum: float = 0.9,
    name: str = "ibot",
) -> Term:
    """iBOT's patch loss with its centre as state; see `repalign.losses.clustering.ibot`.

    Args:
        teacher, student: features [batch, tokens, classes].
        masked: feature [batch, tokens], True where the student's patch was masked.
        teacher_temp, student_temp, center_momentum: as in the loss.
        name: the name of the term.
    """

    def init(key: Array, features: Features) -> tuple[PyTree, PyTree]:
        del key
        return {}, {"center": jnp.zeros(features[teacher].shape[-1], jnp.float32)}

    def apply(params: PyTree, state: PyTree, features: Features, key: Array) -> TermOutput:
        del params, key
        loss, center = clustering.ibot(
            features[teacher],
            features[student],
            features[masked],
            state["center"],
            teacher_temp=teacher_temp,
            student_temp=student_temp,
            center_momentum=center_momentum,
        )
        return TermOutput(loss, {"center": center}, {})

    return Term(name, apply, init)


def mochi(
    *,
    queries: Sequence[str],
    keys: Sequence[str],
    temperature: float,
    queue_size: int = 65_536,
    hardest: int = 1024,
    mixed: int = 1024,
    query_mixed: int = 128,
    name: str = "mochi",
) -> Term:
    """MoCo with a queue as state and MoCHi's mixed negatives; the mean over the views given.

    With ``mixed=0`` and ``query_mixed=0`` it is MoCo: one key against the queue. The queue holds
    unit vectors, random ones at first, and drops its oldest when the keys of a step come in, after
    the loss. Metrics: ``accuracy`` and ``queue_accuracy``, the shares of queries that find their
    key among all logits, and among those of the key and the queue.

    Args:
        queries: features [batch, dim] of the trained network; a name or several.
        keys: features [batch, dim] of the averaged one, the positive of each query; no gradient.
        temperature: positive.
        queue_size: a multiple of the keys of a step.
        hardest, mixed, query_mixed: see `repalign.losses.hard_negatives.mochi`.
        name: the name of the term.

    Raises:
        UserError: other numbers of queries and keys, or a queue size that the keys do not divide.

    Source: He et al. 2020 (arXiv:1911.05722), algorithm 1; facebookresearch/moco@7397dfe
    moco/builder.py (the queue); Kalantidis et al. 2020 (arXiv:2010.01028).
    """
    queries = (queries,) if isinstance(queries, str) else tuple(queries)
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    if len(queries) != len(keys):
        raise UserError(f"objective.{name}: {len(queries)} queries for {len(keys)} keys.")

    def init(key: Array, features: Features) -> tuple[PyTree, PyTree]:
        batch, dim = features[keys[0]].shape
        if queue_size % (batch * len(keys)):
            raise UserError(
                f"objective.{name}.queue_size {queue_size} is not a multiple of the "
                f"{batch * len(keys)} keys of a step."
            )
        queue = l2_normalize(jax.random.normal(key, (queue_size, dim)))
        return {}, {"queue": queue, "oldest": jnp.zeros((), jnp.int32)}

    def apply(params: PyTree, state: PyTree, features: Features, key: Array) -> TermOutput:
        del params
        incoming = [lax.stop_gradient(l2_normalize(features[name])) for name in keys]
        outputs = [
            hard_negatives.mochi(
                features[query],
                positive,
                state["queue"],
                key=jax.random.fold_in(key, view),
                temperature=temperature,
                hardest=hardest,
                mixed=mixed,
                query_mixed=query_mixed,
            )
            for view, (query, positive) in enumerate(zip(queries, incoming, strict=True))
        ]
        new = enqueue(state["queue"], jnp.concatenate(incoming), state["oldest"])
        loss, accuracy, queue_accuracy = (
            sum(values) / len(outputs) for values in zip(*outputs, strict=True)
        )
        metrics = {"accuracy": jnp.mean(accuracy), "queue_accuracy": jnp.mean(queue_accuracy)}
        return TermOutput(loss, new, metrics)

    return Term(name, apply, init)


def enqueue(
    queue: Float[Array, "size dim"], incoming: Float[Array, "batch dim"], oldest: Array
) -> dict[str, Array]:
    """Returns ``{queue, oldest}`` after the incoming rows have taken the oldest rows' places.

    The batch has to divide the size; ``oldest`` is the row where the oldest ones begin.
    """
    renewed = lax.dynamic_update_slice(queue, incoming.astype(queue.dtype), (oldest, 0))
    return {"queue": renewed, "oldest": (oldest + len(incoming)) % len(queue)}


def swapped_assignment(
    *,
    high: Sequence[str],
    low: Sequence[str] = (),
    prototypes: int,
    temperature: float = 0.1,
    sinkhorn_iterations: int = 3,
    sinkhorn_epsilon: float = 0.05,
    queue_size: int = 0,
    balanced: bool = True,
    name: str = "swapped_assignment",
) -> Term:
    """SwAV with its prototypes as parameters; see `repalign.losses.clustering.swapped_assignment`.

    Scores are cosine similarities of embeddings and prototypes, both normalised here (the official
    code renormalises the prototypes in place before each step: the same scores). With a queue,
    earlier embeddings of each high-resolution view take part in the balancing, from the step on at
    which the queue has been filled.

    The metric ``code_entropy`` is that of the shares of the prototypes that are nearest to the
    high-resolution embeddings of the batch, in units of ``log prototypes``: 0 if one prototype has
    them all. (The assignments that balancing makes of the scores are spread by construction.)

    Args:
        high: features [batch, dim], the embeddings of the high-resolution views.
        low: the same of the others.
        prototypes: their number.
        temperature, sinkhorn_iterations, sinkhorn_epsilon: as in the loss.
        queue_size: embeddings kept for each high-resolution view, a multiple of the batch; 0 for
            none.
        balanced: whether Sinkhorn balances the assignments. If not, they are
            ``softmax(scores / sinkhorn_epsilon)``: the control that collapses.
        name: the name of the term.

    Raises:
        UserError: a queue size that the batch does not divide, or a queue without balancing.

    Source: Caron et al. 2020 (arXiv:2006.09882); facebookresearch/swav@06b1b7c main_swav.py.
    """
    high, low = tuple(high), tuple(low)
    if queue_size and not balanced:
        raise UserError(f"objective.{name}.queue_size: the queue is for balancing; set it to 0.")

    def init(key: Array, features: Features) -> tuple[PyTree, PyTree]:
        batch, dim = features[high[0]].shape
        if queue_size % batch:
            raise UserError(
                f"objective.{name}.queue_size {queue_size} is not a multiple of the batch, {batch}."
            )
        params = {"prototypes": l2_normalize(jax.random.normal(key, (prototypes, dim)))}
        if not queue_size:
            return params, {}
        queues = {view: jnp.zeros((queue_size, dim), jnp.float32) for view in high}
        return params, {"queues": queues, "oldest": jnp.zeros((), jnp.int32)}

    def apply(params: PyTree, state: PyTree, features: Features, key: Array) -> TermOutput:
        del key
        codes = l2_normalize(params["prototypes"])

        def scores(embeddings: Array) -> Array:
            return inner_products(l2_normalize(embeddings), codes)

        options = {
            "temperature": temperature,
            "sinkhorn_iterations": sinkhorn_iterations,
            "sinkhorn_epsilon": sinkhorn_epsilon,
        }
        views = [scores(features[view]) for view in high]
        others = [scores(features[view]) for view in low]
        nearest = jnp.stack([jnp.argmax(view, axis=1) for view in views])
        entropy = codebook.entropy(codebook.counts(nearest, size=prototypes))
        metrics = {"code_entropy": entropy / math.log(prototypes)}
        if not balanced:
            # Without a centre DINO is the same cross-entropy, towards the softmax of the scores.
            loss, _ = clustering.dino(
                views,
                [*views, *others],
                jnp.zeros(prototypes, jnp.float32),
                teacher_temp=sinkhorn_epsilon,
                student_temp=temperature,
            )
            return TermOutput(loss, state, metrics)
        if not queue_size:
            loss = clustering.swapped_assignment(views, others, **options)
            return TermOutput(loss, state, metrics)
        # Rows that were never filled are zero; they would take part with equal scores everywhere.
        filled = jnp.any(state["queues"][high[0]][-1] != 0.0)
        loss = lax.cond(
            filled,
            lambda: clustering.swapped_assignment(
                views,
                others,
                queue=[lax.stop_gradient(scores(state["queues"][view])) for view in high],
                **options,
            ),
            lambda: clustering.swapped_assignment(views, others, **options),
        )
        renewed = {
            view: enqueue(state["queues"][view], lax.stop_gradient(features[view]), state["oldest"])
            for view in high
        }
        queues = {view: new["queue"] for view, new in renewed.items()}
        return TermOutput(loss, {"queues": queues, "oldest": renewed[high[0]]["oldest"]}, metrics)

    return Term(name, apply, init)


def msn(
    *,
    anchors: Sequence[str],
    target: str,
    prototypes: int = 1024,
    temperature: float = 0.1,
    sharpening: float = 0.25,
    regularization_weight: float = 1.0,
    name: str = "msn",
) -> Term:
    """MSN with its prototypes as parameters; see `repalign.losses.clustering.msn`.

    Args:
        anchors: features [batch, dim], the masked views.
        target: feature [batch, dim], the unmasked view of the averaged network.
        prototypes: their number; drawn uniformly on the sphere.
        temperature, sharpening, regularization_weight: as in the loss.
        name: the name of the term.
    """

    def init(key: Array, features: Features) -> tuple[PyTree, PyTree]:
        dim = features[target].shape[-1]
        return {"prototypes": l2_normalize(jax.random.normal(key, (prototypes, dim)))}, {}

    def apply(params: PyTree, state: PyTree, features: Features, key: Array) -> TermOutput:
        del key
        loss, diagnostics = clustering.msn(
            jnp.stack([features[view] for view in anchors]),
            features[target],
            params["prototypes"],
            temperature=temperature,
            sharpening=sharpening,
            regularization_weight=regularization_weight,
        )
        return TermOutput(loss, state, diagnostics._asdict())

    return Term(name, apply, init)


def clip(
    *,
    a: str,
    b: str,
    temperature: float = 0.07,
    largest_scale: float = 100.0,
    name: str = "clip",
) -> Term:
    """CLIP with a learned scale; see `repalign.losses.contrastive.clip`.

    The parameter is the scale's logarithm. Beyond ``largest_scale`` it counts as that and gets no
    gradient (the official code sets it back after each step: the same loss).

    Args:
        a, b: features [batch, dim].
        temperature: where the inverse scale starts.
        largest_scale: 100 in the paper.
        name: the name of the term.
    """

    def init(key: Array, features: Features) -> tuple[PyTree, PyTree]:
        del key, features
        return {"logit_scale": jnp.asarray(math.log(1.0 / temperature), jnp.float32)}, {}

    def apply(params: PyTree, state: PyTree, features: Features, key: Array) -> TermOutput:
        del key
        logit_scale = jnp.minimum(params["logit_scale"], math.log(largest_scale))
        loss = contrastive.clip(features[a], features[b], logit_scale=logit_scale)
        return TermOutput(loss, state, {"scale": jnp.exp(logit_scale)})

    return Term(name, apply, init)


def siglip(
    *, a: str, b: str, scale: float = 10.0, bias: float = -10.0, name: str = "siglip"
) -> Term:
    """SigLIP with a learned scale (its logarithm) and bias; see `contrastive.siglip`.

    Args:
        a, b: features [batch, dim].
        scale, bias: where they start; the paper's values.
        name: the name of the term.
    """

    def init(key: Array, features: Features) -> tuple[PyTree, PyTree]:
        del key, features
        return {
            "log_scale": jnp.asarray(math.log(scale), jnp.float32),
            "bias": jnp.asarray(bias, jnp.float32),
        }, {}

    def apply(params: PyTree, state: PyTree, features: Features, key: Array) -> TermOutput:
        del key
        learned = jnp.exp(params["log_scale"])
        loss = contrastive.siglip(features[a], features[b], scale=learned, bias=params["bias"])
        return TermOutput(loss, state, {"scale": learned, "bias": params["bias"]})

    return Term(name, apply, init)
