"""Forward passes on what a frozen encoder has computed: the data are latent vectors, not images."""

from typing import Any

from repalign.train.modules import apply_module, given_features, init_module
from repalign.train.state import Batch, Forward
from repalign.typing import Array, Features, Key, PyTree


def latent_classifier(model: Any, *, representation: str) -> Forward:
    """A classifier of a column of vectors: ``classifier/logits`` [batch, classes] and ``label``.

    Args:
        model: maps vectors [batch, dim] to logits; its parameters are the pass's own.
        representation: the column, such as ``latent/representation``.
    """

    def init(key: Key[Array, ""], batch: Batch) -> tuple[PyTree, PyTree]:
        return init_module(model, key, batch[representation])[1:]

    def apply(
        params: PyTree,
        batch: Batch,
        key: Key[Array, ""],
        *,
        average: PyTree,
        frozen: PyTree,
        state: PyTree,
    ) -> tuple[Features, PyTree]:
        del key, average, frozen
        logits, new_state = apply_module(model, params, state, batch[representation])
        features = given_features(batch)
        return features | {"classifier/logits": logits, "label": batch["label"]}, new_state

    return Forward(init, apply)
