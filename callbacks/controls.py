"""How good a world of latent actions is: pictures, codes, and what actions have in common.

All need no weights but those of the model. Frechet video distance, whose feature network the user
supplies, is in `frechet.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

FLOOR = 1e-10  # of squared errors: 100 dB are perfect


def psnr(made: Tensor, truth: Tensor) -> Tensor:
    """10 log10(1 / mean squared error) in dB of images (..., H, W, C) in [0, 1], (...).

    Example:
        >>> psnr(torch.zeros(1, 2, 2, 3), torch.full((1, 2, 2, 3), 0.1))
        tensor([20.])
    """
    return -10 * (made - truth).square().mean((-3, -2, -1)).clamp(min=FLOOR).log10()


def ssim(made: Tensor, truth: Tensor) -> Tensor:
    """Mean structural similarity of images (..., H, W, C) in [0, 1], a scalar (Wang et al., 2004).

    In Gaussian windows of deviation 1.5.
    """
    ours, theirs = (x.flatten(0, -4).movedim(-1, 1) for x in (made, truth))
    found: Tensor = structural_similarity_index_measure(ours, theirs, data_range=1.0)  # type: ignore[assignment]
    return found


def delta_t_psnr(
    model: Any, start: dict[str, Tensor], truth: Tensor, taken: Tensor, other: Tensor
) -> Tensor:
    """By how many dB a dream by its own actions is nearer to the truth than one by others, (N,).

    PSNR(x_t, x'_t) - PSNR(x_t, x''_t), where x' is dreamed by the actions that were inferred from
    the video and x'' by random ones, both from the frames before (Genie, section 3; there t = 4).

    Args:
        model: an `Imaginer` of video.
        start: states {key: (N, ...)} to dream from.
        truth: x_t, (N, H, W, C) in [0, 1].
        taken: (N, t) or (N, t, A) what led to it.
        other: likewise, random.
    """
    (key,), found = model.spec.images, []
    for actions in (taken, other):
        dream = model.imagine(start, actions, actions.shape[1])
        last = {name: value[:, -1:] for name, value in dream.state.items()}
        found.append(psnr(model.decode(last)[key][:, 0].float(), truth))
    return found[0] - found[1]


def purity(latent: Tensor, true: Tensor) -> float:
    """Share of the steps whose action is the most frequent one of their latent action.

    Args:
        latent, true: integers of one shape.

    Example:
        >>> purity(torch.tensor([0, 0, 0, 1]), torch.tensor([2, 2, 0, 1]))
        0.75
    """
    return float(_together(latent, true).amax(1).sum() / latent.numel())


def mutual_information(latent: Tensor, true: Tensor) -> float:
    """H(latent) + H(true) - H(latent, true) in bits, of integers of one shape."""
    joint = _together(latent, true) / latent.numel()
    entropies = [torch.special.entr(p).sum() for p in (joint.sum(0), joint.sum(1), joint)]
    return float((entropies[0] + entropies[1] - entropies[2]) / torch.tensor(2.0).log())


def code_use(codes: Tensor, size: int) -> tuple[float, float]:
    """Share of `size` codes that occur among integers, and exp of the entropy of their use."""
    share = codes.flatten().bincount(minlength=size).double() / codes.numel()
    return float((share > 0).double().mean()), float(torch.special.entr(share).sum().exp())


def _together(latent: Tensor, true: Tensor) -> Tensor:
    """How often (latent, true) each pair occurs, float64."""
    width = int(true.max()) + 1
    pairs = (latent.flatten() * width + true.flatten()).bincount(minlength=width)
    rows = -(-len(pairs) // width)
    return torch.nn.functional.pad(pairs, (0, rows * width - len(pairs))).view(rows, width).double()
