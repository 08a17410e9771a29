"""The cloned policy, and the dictionary of what latent actions stand for."""

from __future__ import annotations

import pytest
import torch

from datamodules import UserError
from zoo.genie.cloning import ActionMap, Clone, spans
from zoo.genie.patches import Patches
from zoo.nets.st_transformer import Shape


def test_the_clone_sees_no_future_frame() -> None:
    torch.manual_seed(0)
    model = Clone(Patches((16, 16, 3), 8), Shape(1, 16, 2, 8, 32), 6, 4).eval()
    frames = torch.rand(1, 4, 16, 16, 3)
    other = frames.clone()
    other[:, 2] = 1 - other[:, 2]
    with torch.no_grad():
        moved = ((model(frames) - model(other)).abs() > 1e-7).any(-1)[0]
    assert moved.tolist() == [False, False, True, True]


def test_one_patch_can_decide() -> None:
    """Where a head looks at one patch alone, the others do not count."""
    torch.manual_seed(0)
    model = Clone(Patches((16, 16, 3), 8), Shape(1, 16, 2, 8, 32), 6, 4).eval()
    hidden = torch.randn(1, 4, 4, 16)
    model.transformer.forward = lambda *_: hidden  # type: ignore[method-assign]
    with torch.no_grad():
        model.look.weight.copy_(hidden[0, 0, 3] * torch.ones(2, 1))
        model.look.weight.mul_(100)
        model.look.bias.zero_()
        logits = model(torch.rand(1, 4, 16, 16, 3))[0, 0]
        torch.testing.assert_close(logits, model.out(hidden[0, 0, 3].repeat(2)))


def test_spans_overlap() -> None:
    found = spans(torch.arange(10).view(2, 5), 3)
    assert found[:3].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert found[3:].tolist() == [[5, 6, 7], [6, 7, 8], [7, 8, 9]]
    assert torch.equal(spans(torch.arange(3)[None], 4), torch.arange(3)[None])


def test_the_dictionary_counts_until_it_has_enough() -> None:
    dictionary = ActionMap(3, 2)
    dictionary.add(torch.tensor([0, 0, 2, 2]), torch.tensor([1, 1, 0, 1]), most=6)
    dictionary.add(torch.tensor([2, 2, 1, 1]), torch.tensor([0, 0, 1, 1]), most=6)
    assert dictionary.counts[:, :2].tolist() == [[0, 2], [0, 0], [3, 1]]
    dictionary.add(torch.tensor([1]), torch.tensor([1]), most=6)
    assert dictionary.steps == 6
    dictionary.forget()
    assert dictionary.steps == 0


def test_actions_that_there_are_not_are_refused() -> None:
    with pytest.raises(UserError, match="no action 2: the data's are from 0 to 1"):
        ActionMap(3, 2).add(torch.tensor([0, 1]), torch.tensor([1, 2]))


def test_translations_have_the_frequencies_of_the_labels() -> None:
    torch.manual_seed(0)
    dictionary = ActionMap(3, 3)
    latent = torch.arange(3).repeat_interleave(3000)
    assert dictionary.translate(latent, draw=True).bincount().min() > 2800
    dictionary.counts[:, :3] = torch.tensor([[3.0, 1.0, 0.0], [0.0] * 3, [0.0, 0.0, 4.0]])
    drawn = dictionary.translate(latent, draw=True).view(3, -1)
    shares = torch.stack([row.bincount(minlength=3) / 3000 for row in drawn])
    # The one in the middle was never seen: it stands for what all others do.
    expected = torch.tensor([[0.75, 0.25, 0.0], [3 / 8, 1 / 8, 0.5], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
    assert dictionary.translate(torch.arange(3), draw=False).tolist() == [0, 2, 2]
