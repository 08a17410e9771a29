"""Frames to patches and back."""

from __future__ import annotations

import torch

from zoo.genie.patches import Patches


def test_patches_of_sides_that_do_not_fit_are_filled_up_and_cut_off_again() -> None:
    patches = Patches((6, 9, 3), 4)
    frames = torch.rand(2, 3, 6, 9, 3)
    cut = patches.cut(frames)
    assert patches.grid == (2, 3)
    assert cut.shape == (2, 3, patches.count, patches.values) == (2, 3, 6, 48)
    assert torch.equal(patches.join(cut), frames)


def test_a_patch_is_a_square_of_its_frame() -> None:
    frames = torch.arange(2 * 8 * 8.0).view(1, 2, 8, 8, 1)
    cut = Patches((8, 8, 1), 4).cut(frames)
    assert torch.equal(cut[0, 1, 2].view(4, 4), frames[0, 1, 4:, :4, 0])
