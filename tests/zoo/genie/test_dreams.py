"""Dreams: windows of the past, and what is shown of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_genie import batch, build, video
from torch import Tensor

from callbacks.controllability import Steps, measure
from datamodules import UserError


def test_states_are_windows_of_the_past() -> None:
    model = build().eval()
    state, tokens = model.observe(batch()), model.tokenizer.tokens(video().float() / 255)
    assert state["tokens"].shape == (2, 4, 3, 16)
    assert torch.equal(state["tokens"][:, 3], tokens[:, 1:])
    assert torch.equal(state["tokens"][:, 1, 1:], tokens[:, :2])
    assert state["frames"].tolist() == [[1, 2, 3, 3]] * 2
    led = model.latent_actions.infer(video().float() / 255).vectors
    torch.testing.assert_close(state["actions"][:, 3], led)


def test_nothing_is_remembered_of_the_episode_before() -> None:
    first = torch.tensor([[True, False, False, False], [False, False, True, False]])
    state = build().eval().observe(batch(is_first=first))
    assert state["frames"].tolist() == [[1, 2, 3, 3], [1, 2, 1, 2]]


def test_nothing_is_seen_across_the_border_of_episodes() -> None:
    model = build().eval()
    first = torch.zeros(2, 9, dtype=torch.bool)
    first[0, 2] = first[0, 8] = True  # the second row is one episode
    state = model.observe({"obs": {"image": video(9)}, "is_first": first})
    alone = model.observe({"obs": {"image": video(9)[:1, 2:8]}})
    for key in ("tokens", "actions"):  # from the fourth on: those before have others in front
        assert torch.equal(state[key][:1, 5:8], alone[key][:, 3:])
    assert state["frames"][0].tolist() == [1, 2, 1, 2, 3, 3, 3, 3, 1]
    whole = model.observe({"obs": {"image": video(9)[1:]}})
    assert torch.equal(state["tokens"][1:], whole["tokens"])
    codes = model.infer_actions(video(9), first)
    assert codes.shape == (2, 8)
    assert torch.equal(codes[:1, 2:7], model.infer_actions(video(9)[:1, 2:8]))
    assert torch.equal(codes[1:], model.infer_actions(video(9)[1:]))
    assert codes[0, [1, 7]].tolist() == [0, 0]


def test_clips_that_do_not_suit_training_are_refused() -> None:
    model = build()
    with pytest.raises(UserError, match=r"frames=4 .* clips of 3: set --data.clip_length 4"):
        model.on_train_batch_start(batch(3), 0)
    first = torch.zeros(2, 4, dtype=torch.bool)
    model.on_train_batch_start(batch(4, is_first=first), 0)
    first[:, 0] = True
    model.on_train_batch_start(batch(4, is_first=first), 0)
    first[1, 2] = True
    with pytest.raises(UserError, match="go on into the next one"):
        model.on_train_batch_start(batch(4, is_first=first), 0)


def test_clips_of_any_length_are_observed() -> None:
    model = build().eval()
    long, end = video(7), model.observe({"obs": {"image": video(7)[:, 3:]}})
    state = model.observe({"obs": {"image": long}})
    assert state["tokens"].shape[:2] == (2, 7)
    assert torch.equal(state["tokens"][:, 6, -1], end["tokens"][:, 3, -1])
    assert model.infer_actions(long).shape == (2, 6)
    assert torch.equal(model.infer_actions(long)[:, -1], model.infer_actions(long[:, 3:])[:, -1])
    assert model.encode({"image": long}).shape == (2, 7, 16)


def test_a_dream_goes_on_from_its_own_frames() -> None:
    model = build(temperature=0.0).eval()
    start = {key: value[:, 1] for key, value in model.observe(batch()).items()}
    actions = torch.tensor([[0, 5, 2], [1, 1, 4]])
    dream = model.imagine(start, actions, 3)
    assert dream.state["frames"].tolist() == [[3, 3, 3]] * 2
    again = model.imagine({key: v[:, 0] for key, v in dream.state.items()}, actions[:, 1:], 2)
    for key, value in dream.state.items():
        assert torch.equal(value[:, 1:], again.state[key])
    assert torch.equal(dream.state["tokens"][:, 1, :2], dream.state["tokens"][:, 0, 1:])
    book = model.latent_actions.quantizer.lookup(actions)
    torch.testing.assert_close(dream.state["actions"][:, 2], book)
    assert (dream.reward == 0).all()
    assert (dream.cont == 1).all()
    assert model.decode(dream.state)["image"].shape == (2, 3, 16, 16, 3)


def test_states_that_follow_one_another_are_decoded_as_one_clip() -> None:
    model = build(frames=8).eval()
    state = model.observe({"obs": {"image": video(20)}})
    calls = []
    decode = model.tokenizer.decode
    model.tokenizer.decode = lambda *a: calls.append(a[0].shape) or decode(*a)  # type: ignore
    made = model.decode(state)["image"]
    assert made.shape == (2, 20, 16, 16, 3)
    assert sum(shape[1] for shape in calls) <= 40
    # Within one clip it is what each state says alone.
    for step in range(7):
        alone = model.decode({key: value[:, [step]] for key, value in state.items()})["image"]
        torch.testing.assert_close(made[:, [step]], alone, atol=1e-5, rtol=0)
    # States in any order are decoded each for itself.
    mixed = torch.tensor([5, 1, 15, 3])
    shuffled = model.decode({key: value[:, mixed] for key, value in state.items()})["image"]
    for place, step in enumerate(mixed.tolist()):
        alone = model.decode({key: value[:, [step]] for key, value in state.items()})["image"]
        torch.testing.assert_close(shuffled[:, [place]], alone, atol=1e-5, rtol=0)


def test_windows_of_one_frame_are_decoded_alone() -> None:
    model = build(frames=2).eval()
    states = {key: value[:, 1:] for key, value in model.observe(batch(5)).items()}
    alone = {key: value.flatten(0, 1)[:, None] for key, value in states.items()}
    expected = model.decode(alone)["image"][:, 0].unflatten(0, (2, 4))
    torch.testing.assert_close(model.decode(states)["image"], expected)


@pytest.mark.parametrize(
    ("options", "message"), [({"steps": 0}, "steps > 0"), ({"temperature": -1.0}, "of at least 0")]
)
def test_a_dream_refuses_what_it_cannot_be_asked_for(options: dict, message: str) -> None:
    model = build().eval()
    start = {key: value[:, -1] for key, value in model.observe(batch()).items()}
    with pytest.raises(UserError, match=message):
        model.imagine(start, torch.zeros(2, 2, dtype=torch.int64), 2, **options)


def test_decoding_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build().eval()
    state = model.observe({"obs": {"image": video(6, clips=5)}})
    whole = model.decode(state)["image"]
    monkeypatch.setattr("zoo.genie.dreams.DECODED", 8)
    torch.testing.assert_close(model.decode(state)["image"], whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("actions", "text"),
    [
        (torch.tensor([[0], [6]]), "no latent action 6: this Genie has 6, from 0 to 5"),
        (torch.tensor([[-1], [0]]), "no latent action -1"),
        (torch.zeros(2, 1), r"are of shape \(2, 4\), got \(2,\): .* codes from 0 to 5"),
        (torch.zeros(2, 1, 3), r"are of shape \(2, 4\), got \(2, 3\)"),
        (torch.zeros(2, 1, 4, dtype=torch.int64), r"codes of shape \(2,\).*of shape \(2, 4\)"),
        (torch.zeros(1, 1, dtype=torch.int64), r"codes of shape \(2,\).*of shape \(1,\)"),
        (torch.zeros(2, 1, dtype=torch.bool), "got torch.bool"),
    ],
)
def test_latent_actions_that_there_are_not_are_refused(actions: Tensor, text: str) -> None:
    model = build().eval()
    start = {key: value[:, -1] for key, value in model.observe(batch()).items()}
    with pytest.raises(UserError, match=text):
        model.imagine(start, actions, 1)


def test_continuous_actions_are_given_as_vectors() -> None:
    model = build(action_quantizer="none", policy_updates=0).eval()
    start = {key: value[:, -1] for key, value in model.observe(batch()).items()}
    vectors = torch.randn(2, 3, 4)
    assert torch.equal(model.imagine(start, vectors, 3).action, vectors)
    with pytest.raises(UserError, match="have no codes"):
        model.imagine(start, torch.zeros(2, 3, dtype=torch.int64), 3)


def test_random_continuous_actions_are_those_of_other_clips(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, asked = build(action_quantizer="none", policy_updates=0).eval(), []
    imagine = model.imagine

    def spy(start: Any, actions: Tensor, horizon: int) -> Any:
        asked.append(actions)
        return imagine(start, actions, horizon)

    monkeypatch.setattr(model, "imagine", spy)
    clips = video(6, clips=3)
    found = measure(model, Steps(clips, None, None), 2)
    assert found.keys() >= {"delta_t_psnr", "tokenizer_psnr"}
    assert not {"latent_action_purity", "latent_action_perplexity"} & found.keys()
    own, other = asked
    frames = clips[:, 2:].float() / 255  # the window that an action is inferred from
    expected = model.latent_actions.infer(frames).vectors[:, -1]
    torch.testing.assert_close(own[:, -1], expected)
    assert torch.equal(other, own[[2, 0, 1]])
