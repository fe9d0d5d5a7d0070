"""What the leading dimensions of an embedding are worth on their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repalign.metrics import probes
from repalign.registry import UserError, build, lookup
from repalign.train import encoders
from repalign.train.evaluate import EvaluationContext
from repalign.train.loop import EvaluationResult, Evaluator
from repalign.train.state import TrainState
from repalign.train.step import evaluation_params
from repalign.typing import Array, Float


def nearest_neighbor_by_prefix(
    context: EvaluationContext,
    *,
    reference: Mapping[str, Any],
    classes: int,
    prefixes: Sequence[int],
    basis: str = "coordinates",
) -> Evaluator:
    """Test accuracy ``accuracy_<m>`` of the nearest training image by the first m dimensions.

    Nearest by cosine similarity of the prefixes: each is cut first and normalised then, as in the
    official retrieval (RAIVNLab/MRL@23d9b52:retrieval/faiss_nn.ipynb).

    Args:
        reference: source of held-out images.
        classes: number of classes.
        prefixes: the widths m.
        basis: ``coordinates``, the embedding as it is; or ``singular_vectors``, the embedding
            turned so that its first m dimensions are its best linear approximation of rank m on the
            training images (right singular vectors of the embeddings, not centred).

    Raises:
        UserError: an unknown basis or a prefix outside [1, width].
    """
    turn = lookup(_BASES, basis, kind="basis of an embedding")
    held_out = build(reference, place="config.evaluation.metrics.prefixes.reference")
    test = held_out.gather(np.arange(len(held_out)))
    train = context.source.gather(np.arange(len(context.source)))

    @jax.jit
    def measure(train_embedding: Array, test_embedding: Array) -> dict[str, Array]:
        axes = turn(train_embedding)
        train_embedding, test_embedding = train_embedding @ axes, test_embedding @ axes
        return {
            f"accuracy_{prefix}": probes.knn_probe(
                train_embedding[:, :prefix],
                jnp.asarray(train["label"]),
                test_embedding[:, :prefix],
                jnp.asarray(test["label"]),
                classes=classes,
                k=1,
            )
            for prefix in prefixes
        }

    def evaluate(state: TrainState, key: Array) -> EvaluationResult:
        del key
        encoder = encoders.model_encoder(
            context.experiment.forward, evaluation_params(state), state.forward
        )
        embeddings = [encoders.encode(encoder, part["image"]) for part in (train, test)]
        width = embeddings[0].shape[1]
        if not prefixes or min(prefixes) < 1 or max(prefixes) > width:
            raise UserError(
                f"prefixes must lie in 1 ... {width}, the width of the embedding, not "
                f"{list(prefixes)}."
            )
        values = measure(*map(jnp.asarray, embeddings))
        return EvaluationResult({name: float(value) for name, value in values.items()}, {})

    return evaluate


def _singular_vectors(features: Float[Array, "batch dim"]) -> Float[Array, "dim directions"]:
    return jnp.linalg.svd(features, full_matrices=False)[2].T


_BASES = {
    "coordinates": lambda features: jnp.eye(features.shape[1], dtype=features.dtype),
    "singular_vectors": _singular_vectors,
}
