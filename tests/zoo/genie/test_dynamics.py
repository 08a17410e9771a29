"""The dynamics: causality, alignment of actions, masks, unmasking, dreaming frame by frame."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.genie.dynamics import Dynamics, disturb, hide, reveal, unmasking
from zoo.nets.st_transformer import Shape

CODES, WIDTH, GRID, PLACES, FRAMES = 7, 3, (2, 3), 6, 5
MASK = CODES


def build(copy_gate: bool = False) -> Dynamics:
    torch.manual_seed(0)
    shape = Shape(2, 16, 2, 8, 32)
    return Dynamics(CODES, WIDTH, GRID, shape, FRAMES, copy_gate).eval()


def clips(count: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randint(CODES, (count, FRAMES, PLACES)), torch.randn(count, FRAMES, WIDTH)


def changed(a: Tensor, b: Tensor) -> list[bool]:
    return ((a - b).abs().flatten(2).amax(-1) > 1e-7).any(0).tolist()


@pytest.mark.parametrize("copy_gate", [False, True])
def test_no_future_token_or_action_changes_the_past(copy_gate: bool) -> None:
    model, (tokens, actions) = build(copy_gate), clips()
    other = tokens.clone()
    other[:, 3] = (other[:, 3] + 1) % CODES
    led = actions.clone()
    led[:, 3] += 1
    with torch.no_grad():
        plain = model(tokens, actions)
        assert changed(plain, model(other, actions)) == [False] * 3 + [True] * 2
        # An action acts on the frame that it led to.
        assert changed(plain, model(tokens, led)) == [False] * 3 + [True] * 2
        led = actions.clone()
        led[:, 0] += 1
        assert changed(plain, model(tokens, led)) == [False] * FRAMES


def test_actions_are_added_to_all_tokens_of_a_frame() -> None:
    model, (tokens, actions) = build(), clips()
    with torch.no_grad():
        added = model._embedded(tokens, actions, None) - model.embed(tokens)
        torch.testing.assert_close(added[:, 2], model.act(actions[:, 2])[:, None].expand(-1, 6, -1))


def test_no_gradient_reaches_the_actions() -> None:
    model, (tokens, actions) = build(), clips()
    actions.requires_grad_()
    model.loss(tokens, actions, hide(tokens, MASK)).backward()
    assert actions.grad is None
    assert model.act.weight.grad is not None
    assert (model.act.weight.grad != 0).any()


@pytest.mark.parametrize("copy_gate", [False, True])
def test_the_loss_is_the_mean_over_hidden_tokens(copy_gate: bool) -> None:
    model, (tokens, actions) = build(copy_gate), clips()
    seen = tokens.clone()
    seen[0, 2, 3] = seen[1, 4, 0] = MASK
    with torch.no_grad():
        scores = model(seen, actions)
        expected = [
            F.cross_entropy(scores[place], tokens[place]) for place in [(0, 2, 3), (1, 4, 0)]
        ]
        torch.testing.assert_close(model.loss(tokens, actions, seen), torch.stack(expected).mean())
        found = model.loss_and_scores(tokens, actions, seen)[1]
        torch.testing.assert_close(found, torch.stack([scores[0, 2, 3], scores[1, 4, 0]]))
        assert model.loss(tokens, actions, tokens) == 0


def test_each_clip_has_a_mask_rate_of_its_own_between_a_half_and_one() -> None:
    torch.manual_seed(0)
    hidden = hide(torch.zeros(2000, 9, 50, dtype=torch.int64), MASK) == MASK
    assert not hidden[:, 0].any()
    rates = hidden[:, 1:].flatten(1).float().mean(1)
    assert 0.5 - 0.1 < rates.min() < 0.52
    assert rates.max() > 0.98
    # Uniform between 1/2 and 1, and the little that tokens scatter around their clip's rate.
    assert rates.mean() == pytest.approx(0.75, abs=0.01)
    assert rates.std() == pytest.approx(math.sqrt(1 / 48), abs=0.01)
    early, late = (part.flatten(1).float().mean(1) for part in (hidden[:, 1:5], hidden[:, 5:]))
    assert torch.corrcoef(torch.stack([early, late]))[0, 1] > 0.9


def test_the_last_frame_alone_is_hidden_on_demand() -> None:
    torch.manual_seed(0)
    hidden = hide(torch.zeros(400, 4, 50, dtype=torch.int64), MASK, last_only=True) == MASK
    assert not hidden[:, :3].any()
    assert hidden[:, 3].sum(-1).min() >= 15
    assert not hide(torch.zeros(9, 1, 50, dtype=torch.int64), MASK, last_only=True).any()


def test_like_codes_are_read_alike() -> None:
    """With the tokenizer's vectors, a change of a vector changes what its token is read as."""
    book = torch.randn(CODES, 4)
    shape = Shape(1, 16, 2, 8, 32)
    torch.manual_seed(0)
    model = Dynamics(CODES, WIDTH, GRID, shape, FRAMES, code_width=4, lookup=lambda c: book[c])
    tokens = torch.arange(CODES + 1)
    table = model._tokens(tokens)
    expected = model.embed.weight[:-1] + book / book.std() @ model.like.weight.t()  # type: ignore[union-attr]
    torch.testing.assert_close(table[:-1], expected)
    assert torch.equal(table[-1], model.embed.weight[-1])  # a hidden token has no vector


def test_disturbed_tokens_are_a_share_of_each_clip() -> None:
    torch.manual_seed(0)
    tokens = torch.zeros(500, 4, 50, dtype=torch.int64)
    assert disturb(tokens, 1000, 0.0) is tokens
    rates = (disturb(tokens, 1000, 0.2) != 0).flatten(1).float().mean(1)
    assert rates.mean() == pytest.approx(0.1, abs=0.01)
    assert rates.max() < 0.3


@pytest.mark.parametrize(("places", "steps"), [(256, 25), (64, 4), (5, 1)])
def test_unmasking_is_the_cosine_schedule(places: int, steps: int) -> None:
    left = unmasking(places, steps)
    assert len(left) == steps
    assert left[-1] == 0
    for step, count in enumerate(left[:-1], 1):
        assert count == math.floor(places * math.cos(math.pi / 2 * step / steps))


@pytest.mark.parametrize(("places", "steps"), [(64, 25), (16, 25), (3, 8), (1, 4), (2, 2)])
def test_each_step_reveals_at_least_one_token(places: int, steps: int) -> None:
    left = unmasking(places, steps)
    assert len(left) <= min(places, steps)
    assert left[-1] == 0
    assert all(after < before for before, after in zip([places, *left], left, strict=False))


def test_the_surest_tokens_are_kept_and_never_drawn_again() -> None:
    scores = torch.zeros(1, 4, CODES)
    scores[0, torch.arange(4), torch.tensor([1, 2, 3, 4])] = torch.tensor([9.0, 5.0, 7.0, 3.0])
    guess = torch.full((1, 4), MASK)
    guess = reveal(guess, scores, left=2, temperature=0.0, mask=MASK)
    assert guess.tolist() == [[1, MASK, 3, MASK]]
    scores = scores.flip(-1)
    guess = reveal(guess, scores, left=1, temperature=0.0, mask=MASK)
    assert guess.tolist() == [[1, 4, 3, MASK]]
    assert reveal(guess, scores, 0, 0.0, MASK).tolist() == [[1, 4, 3, 2]]


def test_temperature_divides_the_scores() -> None:
    torch.manual_seed(0)
    scores = torch.tensor([1.0, 2.0, 4.0]).log().expand(4000, 1, 3)
    guess = torch.full((4000, 1), 3)
    for temperature, weights in ((1.0, [1, 2, 4]), (2.0, [1, 2**0.5, 2])):
        drawn = reveal(guess, scores, 0, temperature, 3)
        expected = torch.tensor(weights) / sum(weights)
        shares = drawn.flatten().bincount(minlength=3) / 4000
        torch.testing.assert_close(shares, expected.float(), atol=0.03, rtol=0)


@pytest.mark.parametrize("copy_gate", [False, True])
def test_a_dreamed_frame_follows_from_the_whole_past(copy_gate: bool) -> None:
    """With one step and no temperature, by what `forward` says of a frame that is hidden."""
    model, (tokens, actions) = build(copy_gate), clips()
    seen = tokens.clone()
    seen[:, -1] = MASK
    valid = torch.ones(2, FRAMES - 1, dtype=torch.bool)
    with torch.no_grad():
        expected = model(seen, actions)[:, -1].argmax(-1)
    found = model.next_frame(tokens[:, :-1], actions[:, :-1], valid, actions[:, -1], 1, 0.0)
    assert torch.equal(found, expected)
    many = model.next_frame(tokens[:, :-1], actions[:, :-1], valid, actions[:, -1], 4, 1.0)
    assert ((many >= 0) & (many < CODES)).all()


def test_a_short_past_is_padded_in_front() -> None:
    model, (tokens, actions) = build(), clips()
    valid = torch.tensor([[False, False, True, True]]).expand(2, 4)
    padded = model.next_frame(tokens[:, :4], actions[:, :4], valid, actions[:, 4], 1, 0.0)
    short = model.next_frame(tokens[:, 2:4], actions[:, 2:4], valid[:, 2:], actions[:, 4], 1, 0.0)
    assert torch.equal(padded, short)


def test_a_copy_gate_begins_by_copying_what_it_sees() -> None:
    model, (tokens, actions) = build(copy_gate=True), clips()
    seen = tokens.clone()
    seen[:, 3:] = MASK
    with torch.no_grad():
        scores = model(seen, actions)
        torch.testing.assert_close(scores.exp().sum(-1), torch.ones(2, FRAMES, PLACES))
        chance = scores[:, 3].softmax(-1).gather(-1, tokens[:, 2, :, None])
        assert (chance > torch.tensor(4.0).sigmoid()).all()
        # The frame before the last is hidden, and nothing can be copied from it.
        plain = model.out(model.transformer(model._embedded(seen, actions, None)))[:, 4]
        torch.testing.assert_close(scores[:, 4].softmax(-1), plain.softmax(-1))
