import json

import jax
import jax.numpy as jnp
import pytest

from repalign.kernels import choice, tuning
from repalign.kernels.chips import CHIPS

SHAPE = {"codes": 8000, "dim": 8}
HEURISTIC = {"code_block": 1, "vector_block": 2}
CANDIDATES = [
    {"code_block": 128, "vector_block": 64},
    {"code_block": 256, "vector_block": 64},
    {"code_block": 4096, "vector_block": 64},
]


def fake_measure(blocks):
    if blocks["code_block"] == 4096:
        raise ValueError("needs more VMEM than there is\nand a long dump")
    return 1.0 / blocks["code_block"]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """Both files in a directory of the test's own; neither exists."""
    monkeypatch.setenv("REPALIGN_TUNING", str(tmp_path / "user" / "tuning.json"))
    monkeypatch.setattr(tuning, "default_file", lambda op: tmp_path / "tuned.json")
    tuning._read.cache_clear()
    yield
    tuning._read.cache_clear()


def find(dtype=jnp.float32, heuristic=HEURISTIC, **sizes):
    return tuning.lookup("codebook/nearest", SHAPE | sizes, dtype, heuristic=heuristic)


def test_bucket_rounds_up_to_powers_of_two():
    assert tuning.bucket({"codes": 8000, "dim": 8}, jnp.bfloat16) == "codes=8192,dim=8,bfloat16"
    assert tuning.bucket({"a": 1, "b": 9}, "float32") == "a=1,b=16,float32"


def test_the_winner_is_found_again_for_its_bucket_alone():
    assert find() == HEURISTIC
    best, seconds = tuning.tune("codebook/nearest", SHAPE, jnp.float32, CANDIDATES, fake_measure)
    assert best == CANDIDATES[1]
    assert seconds == {
        "code_block=128,vector_block=64": 1 / 128,
        "code_block=256,vector_block=64": 1 / 256,
        "code_block=4096,vector_block=64": "needs more VMEM than there is",
    }
    assert find() == find(codes=8192) == find(codes=4097) == best
    assert find(codes=8193) == find(dim=7, codes=4096) == find(jnp.bfloat16) == HEURISTIC
    # Blocks of an earlier kernel, which took others.
    assert find(heuristic={"code_block": 1}) == {"code_block": 1}


def test_what_is_found_can_be_changed_without_changing_the_table():
    tuning.tune("codebook/nearest", SHAPE, jnp.float32, CANDIDATES, fake_measure)
    find()["code_block"] = 7
    assert find() == CANDIDATES[1]


def test_another_device_has_its_own_entries():
    with jax.sharding.use_abstract_mesh(CHIPS["h100"].described()):
        assert choice.present_device().device_kind == "NVIDIA H100 80GB HBM3"
        tuning.tune("codebook/nearest", SHAPE, jnp.float32, CANDIDATES, fake_measure)
        assert find() == CANDIDATES[1]
    assert find() == HEURISTIC


def test_the_user_s_entry_comes_before_the_committed_one(tmp_path):
    committed = tmp_path / "tuned.json"
    tuning.tune(
        "codebook/nearest", SHAPE, jnp.float32, CANDIDATES[:1], fake_measure, file=committed
    )
    assert find() == CANDIDATES[0]
    tuning.tune("codebook/nearest", SHAPE, jnp.float32, CANDIDATES, fake_measure)
    assert find() == CANDIDATES[1]
    tuning.tune("other", SHAPE, jnp.float32, CANDIDATES, fake_measure)
    assert set(json.loads(tuning.user_file().read_text())) == {"codebook/nearest", "other"}
    assert find() == CANDIDATES[1]


def test_a_tuning_that_never_ran_is_an_error():
    with pytest.raises(ValueError, match="no candidate for codebook/nearest .*more VMEM"):
        tuning.tune("codebook/nearest", SHAPE, jnp.float32, CANDIDATES[2:], fake_measure)
    assert not tuning.user_file().exists()


def test_seconds_times_a_call():
    assert 0.0 < tuning.seconds(jnp.sin, jnp.ones(8), repeats=3) < 10.0


def test_committed_defaults_lie_beside_their_op():
    tuning_file = tuning.pathlib.Path(tuning.__file__).parent / "codebook" / "tuned.json"
    # The fixture replaces the module's own function.
    assert ORIGINAL_DEFAULT_FILE("codebook/nearest") == tuning_file


ORIGINAL_DEFAULT_FILE = tuning.default_file
