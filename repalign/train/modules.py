"""Flax modules as forward passes use them: parameters and other variables kept apart."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from repalign.data.pixels import to_unit_range
from repalign.train.state import Batch
from repalign.typing import Array, Key, PyTree


def init_module(
    module: nn.Module, key: Key[Array, ""], *inputs: Any, **arguments: Any
) -> tuple[Any, PyTree, PyTree]:
    """Returns the outputs of a module for these inputs, its parameters and its state.

    The state holds the collections other than ``params``, such as ``batch_stats``.
    """
    outputs, variables = module.init_with_output(key, *inputs, **arguments)
    state = {name: values for name, values in variables.items() if name != "params"}
    return outputs, variables["params"], state


def apply_module(
    module: nn.Module, params: PyTree, state: PyTree, *inputs: Any, **arguments: Any
) -> tuple[Any, PyTree]:
    """Returns a module's outputs and its new state: a training step's pass.

    A module that keeps batch statistics normalises by those of its inputs here.
    """
    outputs, new_state = module.apply(
        {"params": params, **state}, *inputs, mutable=list(state), **arguments
    )
    return outputs, dict(new_state)


def embedding(outputs: Any) -> Array:
    """Returns the one vector an image of an encoder's outputs: a transformer's is its ``cls``."""
    return outputs["cls"] if isinstance(outputs, Mapping) else outputs


def encode_images(module: nn.Module, params: PyTree, state: PyTree, images: Array):
    """Returns the embedding and the taps of images by a frozen encoder; statistics stay."""
    outputs, taps = module.apply({"params": params, **state}, to_unit_range(images))
    if isinstance(outputs, Mapping):
        taps = {**taps, **outputs}
    return embedding(outputs), taps


def init_encoder_and_head(
    module: nn.Module, head: nn.Module | None, key: Key[Array, ""], images: Array
) -> tuple[tuple[Array, Mapping[str, Array]], dict[str, PyTree], PyTree]:
    """Returns the head's output for these images with the encoder's taps; parameters; the state.

    The parameters are ``{"encoder": ..., "head": ...}``. Without a head the encoder's embedding is
    the output, and there is no ``head``.
    """
    encoder_key, head_key = jax.random.split(key)
    (outputs, taps), params, state = init_module(module, encoder_key, images)
    code, both = embedding(outputs), {"encoder": params}
    if head is not None:
        code, variables = head.init_with_output(head_key, code)
        both["head"] = variables["params"]
    return (code, taps), both, state


def encode_with_head(
    module: nn.Module, head: nn.Module | None
) -> Callable[[PyTree, PyTree, Array], tuple[Array, dict[str, Array]]]:
    """Returns the ``encode`` of a forward pass: the embedding, and the taps with ``projection``.

    That is the head's output, which is there if there is a head.
    """

    def encode(params: PyTree, state: PyTree, images: Array) -> tuple[Array, dict[str, Array]]:
        code, taps = encode_images(module, params["encoder"], state, images)
        if head is None:
            return code, taps
        return code, {**taps, "projection": head.apply({"params": params["head"]}, code)}

    return encode


def given_features(batch: Batch) -> dict[str, Array]:
    """Returns the columns of a batch that are features already: those with a slash in the name."""
    return {name: column for name, column in batch.items() if "/" in name}
