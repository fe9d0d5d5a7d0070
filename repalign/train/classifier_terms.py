"""Terms that classify an embedding and learn the classifier."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from repalign.losses import alignment
from repalign.models.heads import LinearClassifier
from repalign.registry import UserError
from repalign.train.objective import Term, TermOutput
from repalign.typing import Array, Features, PyTree


def matryoshka(
    *,
    embedding: str,
    labels: str,
    prefixes: Sequence[int],
    classes: int,
    tied: bool = False,
    relative_importance: Sequence[float] | None = None,
    name: str = "matryoshka",
) -> Term:
    """Matryoshka representation learning: a linear classifier on each prefix of one embedding.

    The loss is `repalign.losses.alignment.matryoshka_cross_entropy`, a value an example. With one
    prefix, the whole width, it is ordinary classification. Metrics: ``accuracy_<m>`` of the
    classifier of prefix m on the batch. Classifiers start at zero.

    Args:
        embedding: feature [batch, width].
        labels: feature [batch], integers.
        prefixes: the widths m.
        classes: number of classes.
        tied: True makes the classifier of prefix m the first m rows of one matrix, with one bias
            (MRL-E); False gives each its own (MRL).
        relative_importance: weights of the prefixes; 1 each by default.
        name: the name of the term.

    Raises:
        UserError: no prefixes, or one outside [1, width].

    Source: Kusupati et al. 2022 (arXiv:2205.13147), section 3; RAIVNLab/MRL@7ccb42d:MRL.py:33-67.
    """
    prefixes = tuple(prefixes)
    head = LinearClassifier(classes)

    def init(key: Array, features: Features) -> tuple[PyTree, PyTree]:
        values = features[embedding]
        if not prefixes or min(prefixes) < 1 or max(prefixes) > values.shape[-1]:
            raise UserError(
                f"objective.{name}.prefixes must lie in 1 ... {values.shape[-1]}, the width of "
                f"{embedding!r}, not {list(prefixes)}."
            )
        widths = (max(prefixes),) if tied else prefixes
        params = {
            f"classifier_{width}": head.init(jax.random.fold_in(key, number), values[:, :width])[
                "params"
            ]
            for number, width in enumerate(widths)
        }
        return params, {}

    def classifier(params: PyTree, prefix: int) -> PyTree:
        if not tied:
            return params[f"classifier_{prefix}"]
        whole = params[f"classifier_{max(prefixes)}"]["linear"]
        return {"linear": {**whole, "kernel": whole["kernel"][:prefix]}}

    def apply(params: PyTree, state: PyTree, features: Features, key: Array) -> TermOutput:
        del key
        values, answers = features[embedding], features[labels]
        logits = jnp.stack(
            [
                head.apply({"params": classifier(params, prefix)}, values[:, :prefix])
                for prefix in prefixes
            ]
        )
        loss = alignment.matryoshka_cross_entropy(
            logits, answers, relative_importance=relative_importance
        )
        correct = jnp.mean(jnp.argmax(logits, axis=-1) == answers, axis=1)
        metrics = {f"accuracy_{m}": correct[number] for number, m in enumerate(prefixes)}
        return TermOutput(loss, state, metrics)

    return Term(name, apply, init)
