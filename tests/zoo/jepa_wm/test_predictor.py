"""Predictors: formulas, sizes, and what a window may see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.jepa_wm.predictor import (
    ConditionedBlock,
    RecurrentPredictor,
    ResidualPredictor,
    TransformerPredictor,
)
from zoo.nets.transformer import causal_mask

ROWS, FRAMES, LATENT, ACTION = 4, 3, 8, 2
ALL = torch.ones(ROWS, FRAMES, dtype=torch.bool)


@pytest.fixture
def window() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(ROWS, FRAMES, LATENT), torch.randn(ROWS, FRAMES, ACTION)


def transformer(shaken: bool = True) -> TransformerPredictor:
    torch.manual_seed(1)
    predictor = TransformerPredictor(LATENT, ACTION, layers=2, heads=2, history=FRAMES)
    if shaken:
        with torch.no_grad():
            for parameter in predictor.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return predictor


def test_the_hidden_state_of_the_gru_is_the_latent(window: tuple[Tensor, Tensor]) -> None:
    predictor = RecurrentPredictor(LATENT, ACTION)
    gru = nn.GRU(ACTION, LATENT, batch_first=True)
    gru.load_state_dict({f"{k}_l0": v for k, v in predictor.cell.state_dict().items()})
    latents, actions = window
    expected, _ = gru(actions[:, -1:], latents[:, -1].unsqueeze(0))
    torch.testing.assert_close(predictor(latents, actions, ALL), expected[:, 0])


def test_the_published_predictor_has_one_layer() -> None:
    count = sum(p.numel() for p in RecurrentPredictor(512, 2).parameters())
    assert count == 3 * (512 * 512 + 512 * 2 + 2 * 512)


def test_the_mlp_adds_to_the_latent(window: tuple[Tensor, Tensor]) -> None:
    predictor = ResidualPredictor(LATENT, ACTION, 16)
    latents, actions = window
    nn.init.zeros_(predictor.mlp[-1].weight)
    nn.init.constant_(predictor.mlp[-1].bias, 0.5)
    torch.testing.assert_close(predictor(latents, actions, ALL), latents[:, -1] + 0.5)


@pytest.mark.parametrize("kind", ["recurrent", "mlp"])
def test_one_frame_is_all_that_they_see(window: tuple[Tensor, Tensor], kind: str) -> None:
    torch.manual_seed(0)
    predictor = (
        RecurrentPredictor(LATENT, ACTION)
        if kind == "recurrent"
        else ResidualPredictor(LATENT, ACTION, 16)
    )
    for parameter in predictor.parameters():
        nn.init.normal_(parameter)
    latents, actions = window
    assert predictor.history == 1
    short = predictor(latents[:, -1:], actions[:, -1:], ALL[:, -1:])
    torch.testing.assert_close(predictor(latents, actions, ALL), short)


class TestTransformer:
    def test_every_frame_and_every_action_matters(self, window: tuple[Tensor, Tensor]) -> None:
        latents, actions = (x.requires_grad_() for x in window)
        transformer()(latents, actions, ALL).sum().backward()
        assert latents.grad is not None and actions.grad is not None
        assert (latents.grad.abs().amax((0, 2)) > 1e-4).all()
        assert (actions.grad.abs().amax((0, 2)) > 1e-4).all()

    def test_frames_that_are_not_valid_are_not_seen(self, window: tuple[Tensor, Tensor]) -> None:
        predictor, (latents, actions) = transformer(), window
        valid = ALL.clone()
        valid[:, 0] = False
        other = latents.clone()
        other[:, 0] = 7.0
        padded = predictor(latents, actions, valid)
        torch.testing.assert_close(predictor(other, actions, valid), padded)
        assert not torch.allclose(predictor(other, actions, ALL), padded)

    def test_a_short_window_is_one_whose_beginning_is_not_valid(
        self, window: tuple[Tensor, Tensor]
    ) -> None:
        predictor, (latents, actions) = transformer(), window
        valid = ALL.clone()
        valid[:, :2] = False
        short = predictor(latents[:, 2:], actions[:, 2:], ALL[:, 2:])
        torch.testing.assert_close(predictor(latents, actions, valid), short)

    def test_blocks_begin_as_the_identity(self, window: tuple[Tensor, Tensor]) -> None:
        latents, actions = window
        block = ConditionedBlock(LATENT, 2)
        condition = torch.randn(ROWS, FRAMES, LATENT)
        torch.testing.assert_close(block(latents, condition, causal_mask(ALL)), latents)
        predictor = transformer(shaken=False)
        silent = predictor(latents, torch.zeros_like(actions), ALL)
        torch.testing.assert_close(predictor(latents, actions, ALL), silent)

    def test_a_block_is_causal(self, window: tuple[Tensor, Tensor]) -> None:
        torch.manual_seed(0)
        block = ConditionedBlock(LATENT, 2)
        nn.init.normal_(block.modulation.weight)
        x = window[0].requires_grad_()
        condition = torch.randn(ROWS, FRAMES, LATENT)
        block(x, condition, causal_mask(ALL))[:, 1].sum().backward()
        assert x.grad is not None
        assert (x.grad[:, :2] != 0).any(-1).all()
        assert (x.grad[:, 2] == 0).all()
