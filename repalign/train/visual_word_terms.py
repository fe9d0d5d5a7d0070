"""Terms that predict bags of visual words; the vocabulary is state, what reads it is learned."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from repalign.losses import visual_words
from repalign.models.heads import MLPHead
from repalign.numerics import inner_products, l2_normalize
from repalign.registry import UserError
from repalign.train.objective import Term, TermOutput
from repalign.train.stateful_terms import enqueue
from repalign.typing import Array, Features, PyTree


def obow(
    *,
    teacher: str,
    students: Sequence[str],
    words: int = 8192,
    kappa: float = 8.0,
    inverse_delta: float = 15.0,
    pool: str = "max",
    momentum: float = 0.99,
    border: int = 1,
    name: str = "obow",
) -> Term:
    """OBoW: every perturbed crop predicts the visual words of the whole image.

    The logits are ``kappa <G(words), f>`` with f the crop's embedding and G a two-layer network
    from normalised words to unit vectors (hidden width twice f's, batch norm), so that the
    prediction follows the vocabulary as it is renewed: by one word of every image after each step,
    in place of the oldest. The mean over the crops of `repalign.losses.visual_words`'
    ``word_prediction``.

    Args:
        teacher: feature [batch, height, width, dim], the averaged network's map of the image.
        students: features [batch, width], embeddings of the crops; a name or several.
        words: size of the vocabulary, a multiple of the batch; random at first.
        kappa: scale of the logits.
        inverse_delta, pool, momentum: see ``visual_words.bag_of_visual_words``.
        border: rows and columns of the map left out at each side, which padding has touched.
        name: the name of the term.

    Raises:
        UserError: a vocabulary that the batch does not divide.

    Source: Gidaris et al. (arXiv:2012.11552); valeoai/obow@3758504:obow/builder_obow.py:234-290,
    344-430, 496-560 (one level of features; several are several terms).
    """
    students = (students,) if isinstance(students, str) else tuple(students)

    def generator(features: Features) -> MLPHead:
        width = features[students[0]].shape[-1]
        return MLPHead(features=width, hidden=2 * width, layers=2, norm="batch")

    def init(key: Array, features: Features) -> tuple[PyTree, PyTree]:
        batch, _, _, dim = features[teacher].shape
        if words % batch:
            raise UserError(
                f"objective.{name}.words {words} is not a multiple of the batch, {batch}."
            )
        words_key, generator_key = jax.random.split(key)
        vocabulary = jax.nn.relu(jax.random.normal(words_key, (words, dim)))
        params = generator(features).init(generator_key, vocabulary)["params"]
        state = {
            "vocabulary": {"queue": vocabulary, "oldest": jnp.zeros((), jnp.int32)},
            "mean_distance": jnp.asarray(0.5, jnp.float32),
        }
        return {"generator": params}, state

    def apply(params: PyTree, state: PyTree, features: Features, key: Array) -> TermOutput:
        maps = features[teacher]
        maps = maps[:, border : maps.shape[1] - border, border : maps.shape[2] - border]
        vocabulary = state["vocabulary"]["queue"]
        targets, mean_distance = visual_words.bag_of_visual_words(
            maps.reshape(maps.shape[0], -1, maps.shape[-1]),
            vocabulary,
            state["mean_distance"],
            inverse_delta=inverse_delta,
            pool=pool,
            momentum=momentum,
        )
        weights = l2_normalize(
            generator(features).apply({"params": params["generator"]}, l2_normalize(vocabulary))
        )
        losses = [
            visual_words.word_prediction(kappa * inner_products(features[crop], weights), targets)
            for crop in students
        ]
        new = {
            "vocabulary": enqueue(
                vocabulary, visual_words.draw_visual_words(key, maps), state["vocabulary"]["oldest"]
            ),
            "mean_distance": mean_distance,
        }
        used = jnp.exp(jnp.sum(jax.scipy.special.entr(jnp.mean(targets, axis=0))))
        return TermOutput(sum(losses) / len(losses), new, {"perplexity": used})

    return Term(name, apply, init)
