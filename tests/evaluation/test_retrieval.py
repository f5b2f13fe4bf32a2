"""Retrieval by pixels: a picture finds its own reference, among those that compete."""

import pytest
import torch

from latentfm.evaluation.retrieval import ranks, shrink


@pytest.fixture
def references() -> torch.Tensor:
    return torch.rand(6, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_shrink_is_the_mean_of_equal_tiles(references: torch.Tensor) -> None:
    tiles = references.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2))
    torch.testing.assert_close(shrink(references), tiles.flatten(1))


def test_a_copy_is_first_and_a_stranger_is_not(references: torch.Tensor) -> None:
    everyone = torch.ones(6, 6, dtype=torch.bool)
    assert ranks(references + 0.01, torch.arange(6), references, everyone).tolist() == [0] * 6
    shifted = torch.roll(torch.arange(6), 1)
    assert (ranks(references, shifted, references, everyone) > 0).all()


def test_only_allowed_references_compete(references: torch.Tensor) -> None:
    """Picture 0 looks like reference 1 but is asked about reference 0: first only where 1 may not compete."""
    allowed = torch.ones(1, 6, dtype=torch.bool)
    assert ranks(references[1:2], torch.tensor([0]), references, allowed).item() >= 1
    allowed[0, 1:] = False
    assert ranks(references[1:2], torch.tensor([0]), references, allowed).item() == 0


def test_the_own_reference_must_compete(references: torch.Tensor) -> None:
    allowed = torch.ones(1, 6, dtype=torch.bool)
    allowed[0, 2] = False
    with pytest.raises(ValueError, match="own reference"):
        ranks(references[:1], torch.tensor([2]), references, allowed)
