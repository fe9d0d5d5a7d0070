import pytest

from repalign.listing import KINDS, listing
from repalign.registry import resolve
from repalign.train.config import experiment_files


@pytest.mark.parametrize("kind", ["losses", "quantizers", "metrics", "models"])
def test_every_name_is_one_that_a_config_may_write_and_is_documented(kind):
    entries = dict(listing(kind))
    assert len(entries) == len(listing(kind)) > 5
    for name, summary in entries.items():
        assert resolve(name).__doc__, f"{name} has no docstring"
        assert summary and "\n" not in summary, name


def test_known_names_are_there():
    assert "losses.contrastive.nt_xent" in dict(listing("losses"))
    assert "models.sit.SiT" in dict(listing("models"))
    assert "metrics.similarity.cknna" in dict(listing("metrics"))
    assert set(KINDS) == {"experiments", "losses", "quantizers", "metrics", "models"}


def test_experiments_are_listed_with_their_variants():
    entries = dict(listing("experiments"))
    assert set(entries) == set(experiment_files())
    assert entries["repa"].startswith("REPA (Yu et al. 2024")
    assert "Variants: baseline, repa, random_teacher" in entries["repa"]
