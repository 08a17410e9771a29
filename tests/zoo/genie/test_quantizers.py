"""Codes: nearest, straight-through, commitment, moving averages, revival, levels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from datamodules.errors import UserError
from zoo.genie.quantizers import (
    DECAY,
    REVIVED,
    Continuous,
    FiniteScalarQuantizer,
    Quantizer,
    VectorQuantizer,
    make_quantizer,
)


def codebook() -> VectorQuantizer:
    """Two codes, at 0 and at 1, as if they had been learning for long."""
    quantizer = VectorQuantizer(2, 3)
    quantizer.codebook.copy_(torch.tensor([[0.0] * 3, [1.0] * 3]))
    quantizer.sums.copy_(quantizer.codebook / 2)
    quantizer.cluster.fill_(0.5)
    quantizer.seen.fill_(0.5)
    quantizer.begun.fill_(True)
    return quantizer


def test_the_nearest_code_is_taken() -> None:
    found = codebook().eval()(torch.tensor([[[0.2, 0.1, 0.0], [0.9, 0.4, 0.8]]]))
    assert found.codes.tolist() == [[0, 1]]
    torch.testing.assert_close(found.vectors, torch.tensor([[[0.0] * 3, [1.0] * 3]]))


@pytest.mark.parametrize("quantizer", [codebook().eval(), FiniteScalarQuantizer([3, 2, 4])])
def test_gradients_go_straight_through(quantizer: Quantizer) -> None:
    z = torch.randn(5, 3, requires_grad=True)
    weight = torch.randn(5, 3)
    (quantizer(z).vectors * weight).sum().backward()
    slope = 1 - z.detach().tanh() ** 2 if isinstance(quantizer, FiniteScalarQuantizer) else 1.0
    torch.testing.assert_close(z.grad, weight * slope)


def test_commitment_moves_what_is_quantized_and_not_the_codes() -> None:
    quantizer = codebook().eval()
    z = torch.tensor([[0.3, 0.0, 0.0]], requires_grad=True)
    found = quantizer(z)
    assert found.commitment.item() == pytest.approx(0.09 / 3)
    found.commitment.backward()
    torch.testing.assert_close(z.grad, torch.tensor([[0.2, 0.0, 0.0]]))
    assert not list(quantizer.parameters())


def test_codes_follow_by_moving_averages() -> None:
    quantizer = codebook()
    quantizer(torch.tensor([[0.1] * 3, [0.3] * 3, [0.3] * 3, [0.9] * 3]))
    kept = DECAY / 2
    shares = torch.tensor([kept + (1 - DECAY) * 0.75, kept + (1 - DECAY) * 0.25])
    torch.testing.assert_close(quantizer.usage, shares)
    torch.testing.assert_close(quantizer.cluster, shares)
    sums = torch.tensor([(1 - DECAY) * 0.7 / 4, kept + (1 - DECAY) * 0.9 / 4])
    torch.testing.assert_close(quantizer.codebook[:, 0], sums / shares)


def test_nothing_moves_in_evaluation() -> None:
    quantizer = codebook().eval()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer(torch.randn(10, 3))
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


def test_the_first_batch_and_dead_codes_take_vectors_of_the_batch() -> None:
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(4, 3), 5 + torch.randn(6, 3)

    def drawn() -> torch.Tensor:
        return (quantizer.codebook[:, None] - z).abs().amax(-1).amin(1) < 1e-5

    quantizer(z)
    assert drawn().all()
    z = quantizer.codebook[0] + 0.01 * torch.randn(6, 3)
    quantizer.cluster[:] = torch.tensor([0.5, 0.499, 0.0, 1e-4])
    quantizer(z)
    assert drawn().tolist() == [False, False, True, True]
    assert quantizer.cluster[2:].tolist() == pytest.approx([REVIVED / 4] * 2)


def test_dead_codes_take_vectors_that_are_far_from_their_codes() -> None:
    torch.manual_seed(0)
    quantizer = codebook()
    quantizer.cluster[1] = 0.0
    z = torch.zeros(1000, 3)
    z[7] = 0.4  # nearest to code 0, as all others
    quantizer(z)
    torch.testing.assert_close(quantizer.codebook[1], z[7])


@pytest.mark.parametrize("levels", [[2, 2, 2], [8, 8, 8], [3, 2], [5, 4, 3]])
def test_every_code_of_levels_is_found_again(levels: list[int]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    codes = torch.arange(quantizer.size)
    vectors = quantizer.lookup(codes)
    assert quantizer.size == torch.tensor(levels).prod()
    assert len(vectors.unique(dim=0)) == quantizer.size
    assert vectors.abs().max() == 1
    inverse = (vectors * 0.99).clamp(-0.999, 0.999).atanh()
    assert torch.equal(quantizer(inverse).codes, codes)


def test_two_levels_are_the_sign() -> None:
    quantizer = FiniteScalarQuantizer([2, 2])
    found = quantizer(torch.tensor([[0.1, -3.0], [-0.01, 2.0]]))
    assert found.vectors.tolist() == [[1.0, -1.0], [-1.0, 1.0]]
    assert found.commitment == 0


def test_normalized_vectors_use_all_codes_wherever_they_are() -> None:
    torch.manual_seed(0)
    z = 7 + 0.01 * torch.randn(4000, 3)
    assert FiniteScalarQuantizer([2, 2, 2])(z).codes.unique().tolist() == [7]
    shares = FiniteScalarQuantizer([2, 2, 2], normalize=True)(z).codes.bincount() / 4000
    torch.testing.assert_close(shares, torch.full((8,), 1 / 8), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "quantizer", [VectorQuantizer(4, 2), FiniteScalarQuantizer([2, 2])], ids=["vq", "fsq"]
)
def test_health_of_the_codes_is_that_of_what_was_seen(quantizer: Quantizer) -> None:
    torch.manual_seed(0)
    for _ in range(600):  # long enough for dead codes to be revived, again and again
        quantizer(torch.ones(8, 2))
    assert quantizer.alive == 0.25
    assert quantizer.perplexity.item() == pytest.approx(1, abs=0.01)
    assert quantizer.usage.sum().item() == pytest.approx(1)
    for _ in range(600):
        quantizer(4 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]))
    assert quantizer.alive == 1
    assert quantizer.perplexity.item() == pytest.approx(4, abs=0.1)


def rank_main(rank: int, folder: str, z: torch.Tensor) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=2
    )
    torch.manual_seed(rank)  # ranks draw differently
    quantizer = VectorQuantizer(4, 3, normalize=True)
    quantizer.codebook.fill_(0.0)
    rows = z.chunk(2)[rank].clone().requires_grad_()
    found = quantizer(rows)
    (found.vectors * torch.arange(1.0, 4.0)).square().sum().backward()
    torch.save((quantizer.state_dict(), found.vectors.detach(), rows.grad), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_codebooks_of_all_ranks_are_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    z = torch.randn(12, 3) * 3 + torch.arange(12)[:, None]
    mp.spawn(rank_main, (str(tmp_path), z), nprocs=2)
    (ours, _, grad), (theirs, _, other) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    # Actions are standardised as those of one process with all of them.
    whole = VectorQuantizer(4, 3, normalize=True)
    whole.codebook.fill_(0.0)
    joined = z.clone().requires_grad_()
    (whole(joined).vectors * torch.arange(1.0, 4.0)).square().sum().backward()
    torch.testing.assert_close(ours["norm.running_mean"], whole.state_dict()["norm.running_mean"])
    assert joined.grad is not None
    torch.testing.assert_close(torch.cat([grad, other]), joined.grad)


def test_continuous_vectors_pass_and_have_no_codes() -> None:
    quantizer, z = Continuous(3), torch.randn(2, 4, 3)
    assert torch.equal(quantizer(z).vectors, z)
    with pytest.raises(UserError, match="have no codes"):
        quantizer.lookup(torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_looking_teaches_nothing(kind: str) -> None:
    quantizer = make_quantizer(kind, 8, 3, [2, 2, 2], normalize=True)
    quantizer(torch.randn(64, 3))
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    with torch.no_grad():
        seen = quantizer(torch.randn(1, 3)).codes  # one alone has no deviation
    assert seen.shape == (1,)
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, before[key]), key
    quantizer(torch.randn(64, 3))
    assert not torch.equal(quantizer.seen, before["seen"])


def test_levels_and_sizes_are_checked() -> None:
    with pytest.raises(UserError, match=r"levels of at least 2, got \[2, 1\]"):
        FiniteScalarQuantizer([2, 1])
    with pytest.raises(UserError, match="at least 2 codes, got 1"):
        VectorQuantizer(1, 3)
