"""The U-Net, the reward and end model, the agent, and the LSTM they share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.diamond.actor_critic import ActorCritic, actor_critic_losses
from zoo.diamond.lstm import LSTM, Memory
from zoo.diamond.module import PARTS, Diamond
from zoo.diamond.reward_end import Outcome, RewardEndModel
from zoo.diamond.unet import FrameNetwork, ResBlock, SelfAttention, UNet, cut, modulate


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_the_paper() -> None:
    """Measured with 4 actions; the paper (table 4) says 13 million in all."""
    spec = Spec({"image": ArraySpec((64, 64, 3), "uint8")}, ActionSpec("discrete", nvec=(4,)))
    with torch.device("meta"):
        model = Diamond(spec)
    assert [count(getattr(model, p)) for p in PARTS] == [4_405_955, 5_900_864, 3_229_637]


def test_modulation_by_hand() -> None:
    x = torch.randn(2, 32, 4, 4)
    film = torch.cat([torch.full((2, 32, 1, 1), 0.5), torch.full((2, 32, 1, 1), -1.0)], 1)
    normed = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(modulate(x, film), normed * 1.5 - 1, atol=1e-4, rtol=1e-4)
    apart = modulate(torch.cat([x, 100 * x], 1), torch.zeros(2, 128, 1, 1))
    torch.testing.assert_close(apart[:, :32], apart[:, 32:], atol=1e-4, rtol=1e-4)


def test_blocks_start_as_the_identity() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 4, 6)
    films = iter([torch.randn(2, 64, 1, 1), torch.randn(2, 64, 1, 1)])
    torch.testing.assert_close(ResBlock(32, 32)(x, films), x)
    torch.testing.assert_close(SelfAttention(32)(x), x)


def test_attention_reaches_every_pixel() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16)
    nn.init.normal_(attention.out.weight)
    x = torch.randn(1, 16, 4, 4)
    moved = x.clone()
    moved[..., 0, 0] += torch.randn(16)
    assert ((attention(x) - attention(moved)).abs().amax(1) > 1e-6).all()


@pytest.mark.parametrize("size", [(16, 16), (15, 21)])
def test_the_unet_takes_any_size_and_is_conditioned(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    unet = UNet((8, 8, 16), (1, 2, 1), width=12)
    for block in unet.modules():
        if isinstance(block, ResBlock):
            nn.init.normal_(block.conv2.weight, std=0.1)
    x, embedding = torch.randn(2, 8, *size), torch.randn(2, 12)
    out = unet(x, embedding)
    assert out.shape == x.shape
    assert not torch.allclose(out, unet(x, embedding + 1), atol=1e-3)
    # Rows of a batch do not mix.
    torch.testing.assert_close(unet(x[:1], embedding[:1]), out[:1], atol=1e-5, rtol=1e-4)


def test_networks_start_at_zero_and_know_the_action() -> None:
    torch.manual_seed(0)
    network = FrameNetwork(3, 4, 3, (32, 32), (1, 1), 64, attention=False)
    noisy, noise = torch.randn(2, 3, 8, 8), torch.zeros(2)
    past, action = torch.randn(2, 12, 8, 8), torch.eye(3)[torch.tensor([[0, 1, 2, 0]] * 2)]
    embedding = network.embed_past(action)
    assert (network(noisy, noise, past, embedding) == 0).all()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.1)
    out = network(noisy, noise, past, embedding)
    action[0, 3] = torch.eye(3)[1]
    changed = network(noisy, noise, past, network.embed_past(action))
    assert not torch.allclose(out[0], changed[0], atol=1e-4)
    torch.testing.assert_close(out[1], changed[1])


def test_patches_are_channels_of_the_finest_level_and_sides_may_be_odd() -> None:
    torch.manual_seed(0)
    assert cut(torch.rand(2, 3, 7, 9), 2).shape == (2, 12, 4, 5)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(F.pixel_shuffle(cut(x, 2), 2), x)
    network = FrameNetwork(3, 4, 3, (32, 32), (1, 1), 64, attention=False, patch=2)
    assert network.conv_in.in_channels == 5 * 3 * 4
    out = network(torch.randn(2, 3, 7, 9), torch.zeros(2), torch.randn(2, 12, 7, 9), torch.ones(64))
    assert out.shape == (2, 3, 7, 9)
    model = RewardEndModel((7, 9, 3), 2, (8, 16), (1, 1), 8, 16, patch=2, normalize=True)
    frame = torch.randn(2, 3, 7, 9)
    seen = model.features(frame, frame, torch.eye(2))
    assert seen.shape == (2, model.lstm.input_size)
    torch.testing.assert_close(seen.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std(1, False), torch.ones(2), atol=1e-3, rtol=0)
    agent = ActorCritic((15, 18, 3), ActionSpec("discrete", nvec=(3,)), (8, 8), 12, patch=2)
    assert agent(torch.randn(4, 3, 15, 18), agent.lstm.empty(4))[1].shape == (4,)


def test_the_lstm_is_torchs_and_forgets_at_first_steps() -> None:
    torch.manual_seed(0)
    lstm = LSTM(5, 7)
    assert lstm.bias_ih[7:14].tolist() == [1.0] * 7
    torch.testing.assert_close(lstm.weight_hh.T @ lstm.weight_hh, torch.eye(7), atol=1e-5, rtol=0)
    x = torch.randn(2, 6, 5)
    first = torch.zeros(2, 7, dtype=torch.bool)
    first[0, 3] = True
    met = lstm.steps(x, first)
    outputs = met.h[:, 1:]
    reference = nn.LSTM(5, 7, batch_first=True)
    reference.load_state_dict({f"{k}_l0": v for k, v in lstm.state_dict().items()})
    torch.testing.assert_close(outputs[1], reference(x)[0][1])
    torch.testing.assert_close(outputs[0, 3:], reference(x[:1, 3:])[0][0])
    assert (met.h[0, 3] == 0).all()
    assert met.h.shape == met.c.shape == (2, 7, 7)
    assert (met.h[:, 0] == 0).all()
    memory = lstm(x[:, 4], Memory(met.h[:, 4], met.c[:, 4]))
    torch.testing.assert_close(memory.h, outputs[:, 4])
    assert lstm.steps(x[:, :0], first[:, :1]).h.shape == (2, 1, 7)
    # A model that is all bfloat16 remembers in float32.
    low = lstm.to(torch.bfloat16).steps(x.bfloat16(), first)
    assert low.h.dtype == low.c.dtype == torch.float32
    torch.testing.assert_close(low.h, met.h, atol=0.05, rtol=0)


def test_rewards_and_ends() -> None:
    torch.manual_seed(0)
    model = RewardEndModel((8, 12, 3), 2, (8, 16), (1, 1), 8, 16)
    frames, action = torch.randn(2, 5, 3, 8, 12), torch.eye(2)[torch.randint(2, (2, 5))]
    first = torch.zeros(2, 5, dtype=torch.bool)
    first[0, 2] = True
    outcome, met = model(frames, action, first), model.burn_in(frames, action, first)
    assert outcome.reward.shape == (2, 4, 3)
    assert outcome.end.shape == (2, 4, 2)
    assert met.h.shape == (2, 5, 16)
    assert (met.h[0, 2] == 0).all()
    assert model.burn_in(frames[:, :1], action[:, :1], first[:, :1]).h.shape == (2, 1, 16)
    step, after = model.step(
        frames[:, 3], frames[:, 4], action[:, 3], Memory(met.h[:, 3], met.c[:, 3])
    )
    torch.testing.assert_close(step.reward, outcome.reward[:, 3])
    torch.testing.assert_close(after.c, met.c[:, 4])
    # The step into another episode counts for nothing.
    reward, end = torch.randn(2, 5), torch.zeros(2, 5, dtype=torch.bool)
    losses = model.losses(frames, action, first, reward, end)
    reward[0, 2], end[0, 2] = -reward[0, 2], True
    again = model.losses(frames, action, first, reward, end)
    assert losses == again
    reward[1, 2] = -reward[1, 2]
    assert model.losses(frames, action, first, reward, end)["reward"] != losses["reward"]


def test_outcomes_by_hand() -> None:
    sure = Outcome(torch.tensor([[0.0, 0, 50], [50, 0, 0]]), torch.tensor([[50.0, 0], [0, 50]]))
    torch.testing.assert_close(sure.expected_reward(), torch.tensor([1.0, -1.0]))
    reward, end = sure.sample()
    assert reward.tolist() == [1.0, -1.0]
    assert end.tolist() == [False, True]
    even = Outcome(torch.zeros(30_000, 3), torch.tensor([[0.0, 1.0]]).log().expand(30_000, 2))
    reward, end = even.sample()
    assert float(reward.mean()) == pytest.approx(0, abs=0.02)
    assert sorted(set(reward.tolist())) == [-1.0, 0.0, 1.0]
    assert end.all()
    nothing = Outcome.nothing(4, torch.device("cpu"))
    assert nothing.expected_reward().tolist() == nothing.end_probability().tolist() == [0.0] * 4
    reward, end = nothing.sample()
    assert reward.tolist() == [0.0] * 4
    assert not end.any()


@pytest.mark.parametrize(
    "action",
    [
        ActionSpec("discrete", nvec=(3,)),
        ActionSpec("multi_discrete", nvec=(2, 4)),
        ActionSpec("box", low=(-1.0,), high=(2.0,)),
    ],
)
def test_the_agent_starts_indifferent(action: ActionSpec) -> None:
    agent = ActorCritic((16, 16, 3), action, (8, 8), 12)
    policy, value, memory = agent(torch.randn(4, 3, 16, 16), agent.lstm.empty(4))
    assert policy.sample().shape == (4, action.encoded_size)
    assert (value == 0).all()
    assert (memory.h != 0).any()
    if action.kind == "discrete":
        assert policy.entropy().tolist() == pytest.approx([1.0986] * 4, abs=1e-3)


def test_an_agent_that_normalises_sees_black_as_nothing() -> None:
    torch.manual_seed(0)
    space = ActionSpec("discrete", nvec=(3,))
    agent = ActorCritic((16, 16, 3), space, (8, 8), 12, normalize=True)
    conv = agent.encoder[0]
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    heard = []
    conv.register_forward_hook(lambda layer, inputs, out: heard.append(out))
    agent(-torch.ones(1, 3, 16, 16), agent.lstm.empty(1))
    assert (heard[0] == 0).all()
    seen = agent._seen(torch.rand(2, 3, 16, 16))
    torch.testing.assert_close(seen.mean(1), torch.zeros(2), atol=1e-5, rtol=0)


def test_losses_of_the_actor_and_the_critic() -> None:
    log_prob = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    value = torch.tensor([[1.0, 0.0]], requires_grad=True)
    losses = actor_critic_losses(log_prob, torch.tensor([[0.5, 0.7]]), value, torch.full((1, 2), 2))
    assert losses["actor"].item() == pytest.approx((1 * 1 + 2 * 2) / 2)
    assert losses["critic"].item() == pytest.approx((1 + 4) / 2)
    assert losses["entropy"].item() == pytest.approx(-0.6)
    (losses["actor"] + losses["critic"]).backward()
    assert log_prob.grad is not None
    assert value.grad is not None
    assert log_prob.grad.tolist() == [[-0.5, -1.0]]  # higher where the advantage is
    assert value.grad.tolist() == [[-1.0, -2.0]]  # of the critic's loss alone
