"""V: the paper's sizes, its loss, and codes of any mix of observations."""

from __future__ import annotations

import torch
from latent_models import IMAGE, VECTOR, vectors
from torch.distributions import Normal, kl_divergence

from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.world_models.vision import Code, Vision, kl_above

ACTION = ActionSpec("discrete", nvec=(3,))
BOTH = Spec(VECTOR | IMAGE, ACTION)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sizes_of_the_paper() -> None:
    assert count(Vision(Spec(IMAGE, ACTION), 32, 32)) == 4_348_547
    assert count(Vision(Spec(IMAGE, ACTION), 64, 32)) == 4_446_915


def test_kl_above_tolerance() -> None:
    mean, logvar = torch.tensor([[0.0, 0.0], [1.5, -2.0]]), torch.tensor([[0.0, 0.1], [0.4, -3.0]])
    exact = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(kl_above(mean, logvar, 0.0), exact)
    assert exact[0] < 1.0 < exact[1]  # half a nat for each of two variables
    torch.testing.assert_close(
        kl_above(mean, logvar, 0.5), torch.stack([torch.tensor(1.0), exact[1]])
    )


def test_no_gradient_below_the_tolerance() -> None:
    mean = torch.full((1, 4), 0.1, requires_grad=True)
    kl_above(mean, torch.zeros(1, 4), 0.5).sum().backward()
    assert torch.equal(mean.grad, torch.zeros(1, 4))  # type: ignore[arg-type]


def test_reconstruction_is_the_squared_error_summed_over_pixels() -> None:
    vision = Vision(Spec(IMAGE, ACTION), 4, 1)
    image = torch.randint(256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    torch.manual_seed(1)
    losses = vision.losses({"image": image}, 0.5)
    torch.manual_seed(1)
    seen = vision.decode(vision.encode({"image": image}).sample())["image"]
    expected = (seen - image / 255).square().flatten(2).sum(-1).mean()
    torch.testing.assert_close(losses["reconstruction"], expected)


def test_samples_of_a_code() -> None:
    code = Code(torch.full((20000, 1), 2.0), torch.full((20000, 1), 0.5).log() * 2)
    drawn = code.sample()
    assert abs(float(drawn.mean()) - 2.0) < 0.02
    assert abs(float(drawn.std()) - 0.5) < 0.02
    exact = Code(torch.ones(3), torch.full((3,), -torch.inf))
    assert torch.equal(exact.sample(), torch.ones(3))


def test_vectors_are_their_own_code_once_standardised() -> None:
    vision = Vision(vectors(), 16, 8)
    assert not vision.learns
    vision.standardize.mean.fill_(2.0)
    vision.standardize.std.fill_(0.5)
    obs = {"vector": torch.randn(2, 3, 4)}
    code = vision.encode(obs)
    torch.testing.assert_close(code.mean, (obs["vector"] - 2.0) / 0.5)
    assert torch.equal(code.sample(), code.mean)
    torch.testing.assert_close(vision.decode(code.mean)["vector"], obs["vector"])


def test_image_first_then_vectors() -> None:
    spec = Spec({**VECTOR, "height": ArraySpec((), "float32"), **IMAGE}, ACTION)
    obs = {
        "vector": torch.randn(2, 3, 4),
        "height": torch.randn(2, 3),
        "image": torch.randint(256, (2, 3, 64, 64, 3), dtype=torch.uint8),
    }
    vision = Vision(spec, 7, 1)
    code = vision.encode(obs)
    assert code.mean.shape == code.logvar.shape == (2, 3, vision.size) == (2, 3, 7 + 5)
    assert code.logvar[..., :7].isfinite().all()
    assert (code.logvar[..., 7:] == -torch.inf).all()
    decoded = vision.decode(code.mean)
    torch.testing.assert_close(decoded["vector"], obs["vector"])
    torch.testing.assert_close(decoded["height"], obs["height"])
    assert decoded["image"].shape == (2, 3, 64, 64, 3)


def test_small_vae_for_vectors_learns() -> None:
    torch.manual_seed(0)
    vision = Vision(vectors(), 16, 8, vector_latent=2)
    line = torch.randn(256, 1, 1) * torch.tensor([1.0, -1.0, 0.5, 2.0])
    optimizer = torch.optim.Adam(vision.parameters(), 3e-3)
    for _ in range(150):
        losses = vision.losses({"vector": line}, 0.5)
        optimizer.zero_grad()
        (losses["reconstruction"] + losses["kl"]).backward()
        optimizer.step()
    assert losses["reconstruction"] < 0.5 * line.square().sum(-1).mean()
