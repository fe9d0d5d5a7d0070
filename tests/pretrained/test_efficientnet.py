import base64
import lzma
import os
import pickle
import zipfile

import jax
import numpy as np
import pytest

from repalign.models.efficientnet import LITE0, DepthwiseConv, EfficientNet, Stage
from repalign.pretrained import efficientnet
from repalign.pretrained.torch_file import read_torch_state_dict
from repalign.registry import UserError

# Two files that torch.save wrote (torch 2, both layouts), xz: {"a": arange(12).reshape(3, 4).t(),
# "b": int64 [1, -2], "h": half 0.5, "v": a[1:]}.
ZIP_FILE = (
    "/Td6WFoAAATm1rRGAgAhARYAAAB0L+Wj4AhOAs1dACgSvGAn5w2LqFIzP2VjmoZqZRkHEFET6iutDkms9jh7vXCbHx"
    "t3quFDfWGjDQU89FQoRBe4gMHcr65d/7NsM/F8bnKUFx5BgnSN1+zT0HjsipDyCj+zZdaoCsRdjBvA5WQfgwbcd9Xp"
    "CKDsvOnkQy7yKBs1w7KNBL5u7lmjdAn/6c7gWL3dxFfshQpOg0qn9vwZg/tJ4Sylo1lCIny3MyhsxeTT1FEb1TVuZl"
    "RwfMhiSv4WgPYi3aaCVFvBJnPn9odA6AxmaROIDkwMrzoiQ6qaPeGaMjR6urnYcuE/zZUqNpdW1Sk41cEfdhcOY/9C"
    "mREyiFT+LtZvLXklySvG7XDuia9OJtKkG5UUCp8GmIxlrANxj1ppdri8z7ohiGFMYaq2L0tB9oqj7yX8NWXTuy9UaM"
    "u7G9BjSZaxPCH0tP13/IWECr+9w3xg7mV8R0ijOHO2V4V7BgjFA01SNo4pDlkrUT3rLQ6CSf0tkSdofhffuI3sY1u9"
    "+x/Qm9tiupMb5mJa17gLSJ4M3D05B6UohjwDH0KdsxaQPxzbTc+17eSpvkTgat/aKmoPUJYUSVT4sJW57s+hnDRlIh"
    "sDm4yT03Uj2LGgRs4qV/ErJrhXocs8K4VqW8K5rpXkOthm3pJmajOg9jfINaTT1ndU3c1gspYyBURtBzIg3ywnbBkB"
    "EunmUiql+DJE98qqf3obKLcrvT/owSuO7UwgIU36WaG24UlOzqdxuFbZ2P+dDTCY7Ejs9IMG8Dcg39A4//V69nvaaU"
    "d1JHBivgjG8BetrZntqXC/T36shLX6SdBEAfXAozmlQ0XDp/Xzfm6/1Dp711Jj7JiBYQTSlbLkoD9jWCmx+4uCoKeM"
    "oxZfAJA2Y9QHZ0384AFZPB62VZk+u5LZ2XhckA+HfMkPF0ufUMzizbF1lGLE8tJaNZ9WoqefYhHtMO4qCSErKrAQ5/"
    "tgUXTvlAAAAABDZGm4sJcMTQAB6QXPEAAAx0z2CLHEZ/sCAAAAAARZWg=="
)
LEGACY_FILE = (
    "/Td6WFoAAATm1rRGAgAhARYAAAB0L+Wj4ALYAbtdAEAAjPGAJhkC1iRVPcPbH0BrQ7yM1MCLj70ioTyrljj+CWBPRZ"
    "B3m+9BLXGp3OXbyPJv+z1Mk5hXxgOvmUVpblgYAXkx8zck/eSoXqbgAPNu0VIS/bFnHwA4x2rVURpMSzBamBKzRdjx"
    "9BkaUAn8Lx+dscLwfuGchPkVsGNiSptdU+Kh2o8KZ2dq5zlDQedXMbLVt4ZVAafIRDLgK2COkveghlYfxvNy2SJ2Aa"
    "LsWcFwv+8OhNmsih64ond3KiPBV0r74XZJCizpuJxi0oHTRNxFOyxZvqVvOu+TssokxTe4gJltvy6ocXEQlguZOcTn"
    "UqBZykda6I0eC8yWE+CeS5zfcZJ2KHVo6Y6bwptOA4SkWBmcXDfbvJdGV8TW6V3iw8QTg+ZWYVHwHR+jMcJQ76ln8a"
    "ieusPoubIiw+yUTseFHufAA2yJpM0z0usGJkyUkmkH1ku47zpTisRwd8qGqUrq5Ivni96cbX+baXIQd/jkfYG7EBz2"
    "JNqj/9VRZ1sBXg3HmLszHHwYzCnYzMwpetikE4Bngg9cK97ztiym923sbsGXyh8mowYcx+MTt+HsV4BLAvuN9GuY+b"
    "wAAABOrXypCEmBswAB1wPZBQAAYrZZ1rHEZ/sCAAAAAARZWg=="
)


def fixed_images():
    i, j = np.arange(28)[:, None], np.arange(28)[None]
    planes = [(a * i**2 + 7 * b * j + c * i * j) % 256 for a, b, c in ((3, 5, 1), (1, 2, 5))]
    return np.stack(planes).astype(np.uint8)[..., None]


# Channel 0 of the first image's stage-5 map, the mean over tokens of channels 0 to 7, the map's
# norm, from an independent torch forward in float64 (unfolded batch norm, grouped convolutions,
# interpolate(bilinear, align_corners=False)) with the original weights.
CHANNEL_0 = [
    [-14.35093636, -5.36568114, -7.02533277, -11.83726506],
    [-7.02676725, 1.17731259, -8.31748491, -3.58159786],
    [-4.59511067, 1.00946009, 4.35353179, 3.56084772],
    [0.48084722, 5.5083835, 5.31395542, 0.98393054],
]
MEANS = [
    [-2.481994, -0.036501, 0.760568, 0.300172, 9.973088, 8.507494, -0.103795, 6.319442],
    [4.640003, 3.174821, -1.535875, 0.627990, 4.338736, 6.833172, 1.664891, 1.483966],
]
NORM = 444.0247907733973


def test_teacher_tokens_match_the_original_network():
    images = fixed_images()
    tokens = np.asarray(efficientnet.teacher_tokens(images))
    assert tokens.shape == (2, 16, 112)
    # Stored in half precision: 0.3 % of the map, whose entries have a standard deviation of 7.4.
    np.testing.assert_allclose(tokens[0, :, 0].reshape(4, 4), CHANNEL_0, atol=0.1)
    np.testing.assert_allclose(tokens.mean(1)[:, :8], MEANS, atol=0.03)
    np.testing.assert_allclose(np.linalg.norm(tokens), NORM, rtol=1e-3)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        efficientnet.teacher_tokens(np.repeat(images, 2, axis=-1))
    with pytest.raises(ValueError, match="multiple of 16"):
        efficientnet.teacher_tokens(images, size=60)


def random_state_dict(rng):
    """A state dict of the original's names and shapes; values keep activations of order one."""
    weights = {}

    def convolution(name, norm, out, into, size):
        scale = 1.5 / np.sqrt(into * size * size)
        weights[f"{name}.weight"] = scale * rng.normal(size=(out, into, size, size))
        for field in ("weight", "bias", "running_mean"):
            weights[f"{norm}.{field}"] = rng.normal(size=out) * 0.2 + (field == "weight")
        weights[f"{norm}.running_var"] = rng.uniform(0.5, 1.5, out)
        weights[f"{norm}.num_batches_tracked"] = np.array(0)

    convolution("_conv_stem", "_bn0", 32, 3, 3)
    width, block = 32, 0
    for stage in LITE0:
        for _ in range(stage.blocks):
            prefix, inner = f"_blocks.{block}", width * stage.expansion
            if stage.expansion != 1:
                convolution(f"{prefix}._expand_conv", f"{prefix}._bn0", inner, width, 1)
            convolution(f"{prefix}._depthwise_conv", f"{prefix}._bn1", inner, 1, stage.kernel_size)
            convolution(f"{prefix}._project_conv", f"{prefix}._bn2", stage.width, inner, 1)
            width, block = stage.width, block + 1
    convolution("_conv_head", "_bn1", 1280, 320, 1)
    weights["_fc.weight"], weights["_fc.bias"] = rng.normal(size=(1000, 1280)), np.zeros(1000)
    return weights


def test_convert_folds_the_norm_and_names_what_does_not_fit():
    weights = random_state_dict(np.random.default_rng(0))
    params = efficientnet.convert(weights)
    shapes = jax.eval_shape(EfficientNet().init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    expected = jax.tree.map(lambda leaf: leaf.shape, shapes["params"])
    assert jax.tree.map(np.shape, params) == expected
    # One channel by hand: batch norm after the product equals the folded product.
    x = np.random.default_rng(1).normal(size=16)
    fields = ("weight", "bias", "running_mean", "running_var")
    norm = {field: weights[f"_blocks.1._bn0.{field}"][7] for field in fields}
    plain = weights["_blocks.1._expand_conv.weight"][7, :, 0, 0] @ x
    expected = (plain - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3)
    expected = expected * norm["weight"] + norm["bias"]
    folded = params["block_1"]["expand"]
    assert x @ folded["kernel"][:, 7] + folded["bias"][7] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="also .'extra'"):
        efficientnet.convert({**weights, "extra": np.zeros(1)})
    del weights["_blocks.4._bn1.bias"]
    with pytest.raises(UserError, match="no tensor '_blocks.4._bn1.bias'"):
        efficientnet.convert(weights)


def test_model_names_its_taps_and_strides():
    stages = (Stage(1, 3, 1, 1, 4), Stage(1, 5, 2, 2, 6))
    model = EfficientNet(stages=stages, head_width=8, classes=5)
    images = jax.random.normal(jax.random.key(0), (2, 15, 12, 3))
    (logits, taps), params = jax.jit(model.init_with_output)(jax.random.key(1), images)
    assert logits.shape == (2, 5)
    assert {name: tap.shape for name, tap in taps.items()} == {
        "stem": (2, 8, 6, 32),
        "stage_1": (2, 8, 6, 4),
        "stage_2": (2, 4, 3, 6),
        "pooled": (2, 8),
    }
    # The sum of shifted products is the grouped convolution.
    kernel = params["params"]["block_1"]["depthwise"]["kernel"]
    x = jax.random.normal(jax.random.key(2), (2, 8, 6, kernel.shape[-1]))
    grouped = jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=kernel.shape[-1],
    )
    depthwise = params["params"]["block_1"]["depthwise"]
    shifted = jax.jit(DepthwiseConv(5, 2).apply)({"params": depthwise}, x)
    np.testing.assert_allclose(shifted, grouped, atol=1e-5)


@pytest.mark.parametrize("packed", [ZIP_FILE, LEGACY_FILE], ids=["zip", "legacy"])
def test_reads_torch_files(packed, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(lzma.decompress(base64.b64decode(packed)))
    tensors = read_torch_state_dict(path)
    np.testing.assert_array_equal(tensors["a"], np.arange(12.0).reshape(3, 4).T)
    np.testing.assert_array_equal(tensors["v"], np.arange(12.0).reshape(3, 4).T[1:])
    np.testing.assert_array_equal(tensors["b"], [1, -2])
    assert tensors["b"].dtype == np.int64
    assert tensors["h"].dtype == np.float16 and tensors["h"].shape == () and tensors["h"] == 0.5


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_refuses_a_pickle_that_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("attack.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": Attack()}))
    (tmp_path / "legacy.pth").write_bytes(pickle.dumps(Attack()))
    for name in ("attack.pth", "legacy.pth"):
        with pytest.raises(UserError, match="asks to run .*mkdir"):
            read_torch_state_dict(name)
    assert not (tmp_path / "attacked").exists()
    (tmp_path / "noise.pth").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="not a PyTorch state-dict"):
        read_torch_state_dict("noise.pth")
    with pytest.raises(UserError, match="no such file"):
        read_torch_state_dict("missing.pth")
