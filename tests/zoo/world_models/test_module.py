"""The stages of one training: who learns when, what is carried over, and going on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from latent_models import sequences, vectors
from torch import Tensor
from walk import Walk

from datamodules import EnvDataModule, OfflineDataModule
from datamodules.envs.factory import make_env
from datamodules.errors import UserError
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.collecting import Amount, Part, collect
from zoo.world_models.gate import agreement, fixed_policies
from zoo.world_models.module import Clock, WorldModels

TINY: dict[str, Any] = {
    "latent": 3,
    "depth": 1,
    "hidden": 8,
    "vision_updates": 3,
    "memory_updates": 4,
    "generations": 2,
    "population": 4,
    "rollouts": 3,
    "horizon": 6,
    "vision_batch": 8,
    "gate_episodes": 2,
}
ROUND = 3 + 4 + 2
THREE = ActionSpec("discrete", nvec=(3,))


def walk_data(folder: Path, **options: Any) -> EnvDataModule:
    settings = {"batch_size": 4, "sequence_length": 4, "num_envs": 2, "episodes": 6}
    return EnvDataModule(
        Walk,
        policy="random",
        directory=folder,
        **{**settings, **options},  # type: ignore[arg-type]
    )


def model_for(data: EnvDataModule, **options: Any) -> WorldModels:
    torch.manual_seed(0)
    return WorldModels(data.spec, **{**TINY, **options})


def fit(
    model: WorldModels,
    data: EnvDataModule,
    updates: int,
    callbacks: list[pl.Callback] | None = None,
    checkpoint: Path | None = None,
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=updates,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trainer


class Watch(pl.Callback):
    """Calls a function at the end of each update."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        self.function(trainer, pl_module)


def weights(model: WorldModels) -> dict[str, dict[str, Tensor]]:
    return {
        stage: {k: v.clone() for k, v in getattr(model, stage).named_parameters()}
        for stage in ("vision", "memory", "controller")
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[key]) for key, value in a.items())


def test_sizes_of_the_paper() -> None:
    image = {"image": ArraySpec((64, 64, 3), "uint8")}
    car = ActionSpec("box", low=(-1.0, 0.0, 0.0), high=(1.0, 1.0, 1.0))
    import zoo

    for name, action, sizes in (
        ("car-racing", car, (4_348_547, 422_368, 867)),
        ("take-cover", THREE, (4_446_915, 1_678_785, 1_088)),
    ):
        model: Any = zoo.create(f"world-models/{name}", Spec(image, action))
        parts = (model.vision, model.memory, model.controller)
        assert tuple(sum(p.numel() for p in part.parameters()) for part in parts) == sizes


def test_clock() -> None:
    model = WorldModels(walk_data(Path()).spec, **{**TINY, "rounds": 2})
    seen = []
    for updates in range(2 * ROUND + 2):
        model.updates = updates
        seen.append(model.clock)
    one = [("vision", i) for i in range(3)] + [("memory", i) for i in range(4)]
    one += [("controller", i) for i in range(2)]
    expected = [Clock(0, *at) for at in one] + [Clock(1, *at) for at in one]
    assert seen == [*expected, Clock(1, "controller", 2), Clock(1, "controller", 3)]


def test_without_anything_to_see_there_is_no_stage_for_it() -> None:
    assert WorldModels(vectors(), **TINY).clock.stage == "memory"
    assert WorldModels(vectors(), **TINY, vector_latent=2).clock.stage == "vision"


def test_one_part_learns_at_a_time(tmp_path: Path) -> None:
    data = walk_data(tmp_path)
    model = model_for(data, rounds=2)
    before = weights(model)
    learnt = []

    def look(trainer: Any, module: WorldModels) -> None:
        nonlocal before
        after = weights(module)
        learnt.append([stage for stage in after if not same(before[stage], after[stage])])
        before = after

    trainer = fit(model, data, 2 * ROUND, [Watch(look)])
    stages = [["vision"]] * 3 + [["memory"]] * 4 + [["controller"]] * 2
    assert learnt == stages * 2
    assert trainer.global_step == model.updates == 2 * ROUND


def test_learning_rates_fall_within_a_stage(tmp_path: Path) -> None:
    data = walk_data(tmp_path)
    model = model_for(data, memory_lr=0.4, memory_decay=0.5, vision_lr=0.01)
    rates = []

    def look(trainer: Any, module: WorldModels) -> None:
        rates.append({g["name"]: g["lr"] for g in trainer.optimizers[0].param_groups})

    fit(model, data, 7, [Watch(look)])
    assert [rate["vision"] for rate in rates[:3]] == [0.01] * 3
    assert [rate["memory"] for rate in rates[3:]] == pytest.approx([0.4, 0.35, 0.3, 0.25])


def test_gradients_are_clipped_one_by_one() -> None:
    model = WorldModels(vectors(), **TINY, clip=1e-3)
    model.training_step(sequences(model.spec), 0).backward()
    optimizer: Any = model.configure_optimizers()
    model.on_before_optimizer_step(optimizer)
    largest = max(float(p.grad.abs().max()) for p in model.memory.parameters())  # type: ignore
    assert largest == pytest.approx(1e-3)


def test_every_frame_is_encoded_once(tmp_path: Path) -> None:
    data = walk_data(tmp_path)
    model = model_for(data)
    frames = 0
    encode = model.vision.encode

    def counting(obs: Any) -> Any:
        nonlocal frames
        frames += obs["image"].shape[:-3].numel()
        return encode(obs)

    model.vision.encode = counting  # type: ignore[method-assign]
    batches = []

    def look(trainer: Any, module: WorldModels) -> None:
        if module.updates == 3 + 4:
            batches.append(frames)
            batch = data.next_batch()
            assert "image" not in batch["obs"]
            batches.append(batch)

    model.gate_episodes = 0
    fit(model, data, 3 + 4, [Watch(look)])
    held = data._restored[0]["replay"]["latents"]  # type: ignore[index]
    assert batches[0] == sum(len(stream["mean"]) for stream in held.values())
    stored = torch.cat([stream["mean"] for stream in held.values()])
    assert (stored != 0).all()


def test_memory_learns_from_stored_codes() -> None:
    model = WorldModels(
        Spec({"image": ArraySpec((64, 64, 1), "uint8")}, ActionSpec("discrete", nvec=(2,))), **TINY
    )
    model.updates = 3
    batch = sequences(model.spec)
    torch.manual_seed(0)
    with torch.no_grad():
        code = model.vision.encode(batch["obs"])
    encoded = model.training_step(batch, 0)
    torch.manual_seed(0)
    model.vision.encode = None  # type: ignore[assignment]
    torch.manual_seed(0)
    batch["latents"] = code._asdict()
    del batch["obs"]
    first = model.training_step(batch, 0)
    second = model.training_step(batch, 0)
    assert first.isfinite()
    assert encoded.isfinite()
    assert first != second  # z is drawn anew from mean and deviation for every batch


def test_vectors_are_standardised_over_the_replay(tmp_path: Path) -> None:
    data = EnvDataModule(
        "CartPole-v1", policy="random", episodes=5, batch_size=2, sequence_length=4,
        num_envs=2, directory=tmp_path,
    )  # fmt: skip
    model = model_for(data, delta=True)
    seen: list[Tensor] = []
    steps: list[Tensor] = []
    rewards: list[Tensor] = []

    def look(trainer: Any, module: WorldModels) -> None:
        if not seen:
            batches = list(data.sweep(10_000))
            seen.extend(batch["obs"]["vector"][0] for batch in batches)
            for batch in batches:
                step = torch.diff(batch["obs"]["vector"][0], dim=0)
                steps.append(step[~batch["is_first"][0, 1:]])
                rewards.append(batch["reward"][~batch["is_first"]])

    fit(model, data, 1, [Watch(look)])
    x = torch.cat(seen)
    torch.testing.assert_close(model.vision.standardize.mean, x.mean(0))
    torch.testing.assert_close(model.vision.standardize.std, x.std(0, correction=0))
    z = (x - x.mean(0)) / x.std(0, correction=0)
    torch.testing.assert_close(model.memory.low, z.amin(0))
    torch.testing.assert_close(model.memory.high, z.amax(0))
    earned = torch.cat(rewards)
    assert model.memory.rewards.tolist() == [earned.min(), earned.max()]
    expected = (torch.cat(steps) / x.std(0, correction=0)).std(0, correction=0)
    torch.testing.assert_close(model.memory.scale, expected)


def test_each_round_collects_with_the_controller(tmp_path: Path) -> None:
    data = walk_data(tmp_path)
    model = model_for(data, rounds=2)
    acted: list[int] = []
    act = model.act

    def acting(*arguments: Any, **options: Any) -> Any:
        acted.append(model.updates)
        return act(*arguments, **options)

    model.act = acting  # type: ignore[method-assign]
    episodes = []
    fit(model, data, ROUND + 1, [Watch(lambda t, m: episodes.append(data.collector.episodes))])  # type: ignore
    assert acted
    assert set(acted) == {ROUND}
    assert episodes[0] == episodes[ROUND - 1] >= 6
    assert episodes[ROUND] >= 12


@pytest.mark.parametrize(
    ("evolve_in", "kills"),
    [("dream", (17, 16, 12, 11, 9, 8, 7, 4, 3, 1)), ("environment", (17, 8))],
)
def test_killed_in_any_stage_and_resumed(
    tmp_path: Path, evolve_in: str, kills: tuple[int, ...]
) -> None:
    """Within the stages of two rounds and between them: the end is the same, bit for bit."""
    options = {"rounds": 2, "evolve_in": evolve_in, "delta": True, "exploration": 0.1}
    data = walk_data(tmp_path / "replay")
    model = model_for(data, **options)

    def save(trainer: Any, module: WorldModels) -> None:
        trainer.save_checkpoint(tmp_path / f"{module.updates}.ckpt")

    fit(model, data, 2 * ROUND, [Watch(save)])
    once = torch.load(tmp_path / f"{2 * ROUND}.ckpt", weights_only=True)
    # The replay can only be cut back, so the latest kill comes first.
    last = tmp_path / "again.ckpt"
    keep = Watch(lambda t, m: t.save_checkpoint(last) if m.updates == 2 * ROUND else None)
    for killed in kills:
        torch.manual_seed(99)
        again_data = walk_data(tmp_path / "replay")
        again = WorldModels(again_data.spec, **{**TINY, **options})
        fit(again, again_data, 2 * ROUND, [keep], tmp_path / f"{killed}.ckpt")
        found = torch.load(last, weights_only=True)
        for key in ("state_dict", "optimizer_states", "evolution", "zoo", "EnvDataModule"):
            assert not differences(once[key], found[key], key), f"killed after update {killed}"


def differences(a: Any, b: Any, path: str) -> list[str]:
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [path]
        return [d for k in a for d in differences(a[k], b[k], f"{path}/{k}") if k != "store"]
    if isinstance(a, list):
        if len(a) != len(b):
            return [path]
        return [d for i, x in enumerate(a) for d in differences(x, b[i], f"{path}/{i}")]
    equal = torch.equal(a, b) if isinstance(a, Tensor) else a == b
    return [] if equal else [path]


@pytest.mark.slow
def test_dreams_lead_to_the_goal(tmp_path: Path) -> None:
    """What evolves in the dream of a walk goes right in reality."""
    data = walk_data(tmp_path, episodes=40, batch_size=16)
    model = model_for(
        data, latent=4, hidden=32, vision_updates=120, memory_updates=250, generations=8,
        population=12, rollouts=8, horizon=12, vision_lr=3e-3, memory_lr=1e-2, sigma=0.5,
        head_units=16, vision_batch=32,
    )  # fmt: skip
    fit(model, data, 120 + 250 + 8)
    env = Walk()
    state, earned = model.initial_state(1), []
    for seed in range(5):
        obs, _ = env.reset(seed=seed)
        state, total, over = model.initial_state(1), 0.0, False
        while not over:
            image = torch.from_numpy(obs)[None]
            action, state = model.act({"image": image}, state, explore=False)
            obs, reward, terminated, truncated, _ = env.step(int(action))
            total, over = total + float(reward), terminated or truncated
        earned.append(total)
    assert sum(earned) / len(earned) > 6.0  # always right earns about 9, random about 1


def test_evolves_in_reality_and_counts_it(tmp_path: Path) -> None:
    data = walk_data(tmp_path)
    model = model_for(data, evolve_in="environment")
    steps = []
    fit(model, data, ROUND, [Watch(lambda t, m: steps.append(m.env_steps))])
    assert steps[6] < steps[7] < steps[8]
    assert steps[8] - steps[7] <= (TINY["population"] + 1) * TINY["rollouts"] * TINY["horizon"]


def test_the_gate_warns_of_dreams_that_promise_too_much(tmp_path: Path) -> None:
    data = walk_data(tmp_path)
    model = model_for(data, step_reward=1.0)  # 1 a step, where walking earns next to nothing
    with pytest.warns(UserWarning, match="the policy 'always_0' earns .* there and 0.0 in the env"):
        fit(model, data, ROUND)


def test_agreement() -> None:
    assert agreement(10.0, 10.0) == agreement(0.0, 0.0) == 1.0
    assert agreement(10.0, 5.0) == agreement(5.0, 10.0) == agreement(-5.0, -10.0) == 2.0
    assert agreement(1.0, 0.0) == agreement(1.0, -1.0) == float("inf")


@pytest.mark.parametrize("kind", ["discrete", "box", "multi_discrete"])
def test_fixed_policies_stay_in_the_action_space(kind: str) -> None:
    spec = vectors(kind)
    policies = fixed_policies(spec)
    assert "random" in policies
    for actions in policies.values():
        assert actions.shape[1:] == spec.action.shape
    if kind == "discrete":
        assert list(policies) == ["always_0", "always_1", "always_2", "random"]


def test_explores_at_random_until_it_has_evolved() -> None:
    model = WorldModels(
        Spec({"vector": ArraySpec((2,), "float32")}, ActionSpec("discrete", nvec=(3,))), **TINY
    )
    obs, state = {"vector": torch.zeros(600, 2)}, model.initial_state(600)
    action, _ = model.act(obs, state, explore=True)
    assert (torch.bincount(action, minlength=3) > 150).all()
    assert not model.act(obs, state, explore=False)[0].any()
    model.has_evolved.fill_(True)
    assert not model.act(obs, state, explore=True)[0].any()


def test_acting_and_observing_remember_the_same() -> None:
    model = WorldModels(vectors("discrete"), **TINY, features="zch", restart_input=True)
    batch = sequences(model.spec)
    model.controller.load(torch.randn(model.controller.size))
    state = model.initial_state(2)
    for t in range(4):
        obs = {"vector": batch["obs"]["vector"][:, t]}
        batch["action"][:, t], state = model.act(obs, state, explore=False)
    batch["is_first"][:, 0] = True
    seen = model.observe(batch)
    torch.testing.assert_close(seen["h"][:, 4], state["h"])
    torch.testing.assert_close(seen["c"][:, 4], state["c"])
    assert not seen["first"][:, 1:].any()
    batch["is_first"][:, 2] = True
    assert not model.observe(batch)["h"][:, 2].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "has no size 'huge'"),
        ({"population": 1}, "population of at least 2, got 1"),
        ({"temperature": 0.0}, "temperature > 0, got 0.0"),
        ({"evolve_in": "sleep"}, "has no evolve_in 'sleep'"),
        ({"features": "ch"}, "has no features 'ch'"),
        ({"memory_decay": 1.5}, "memory_decay from 0 to 1, got 1.5"),
        ({"mixtures": -1}, "mixtures of at least 0, got -1"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WorldModels(vectors(), **{**TINY, **options})


def test_reality_needs_a_datamodule() -> None:
    model = WorldModels(vectors(), **{**TINY, "evolve_in": "environment"})
    model.updates = 4
    with pytest.raises(UserError, match="needs an EnvDataModule"):
        model.training_step(sequences(model.spec), 0)


@pytest.mark.slow
def test_cartpole_is_solved_in_the_dream(tmp_path: Path) -> None:
    from zoo import configs, registry
    from zoo.evaluate import evaluate

    settings = configs.compose("world-models/cartpole")
    data = EnvDataModule(directory=tmp_path, **settings["data"]["init_args"])
    torch.manual_seed(0)
    model: Any = registry.create("world-models/cartpole", data.spec)
    fit(model, data, configs.budget(settings)["updates"])
    assert model.env_steps <= 5000
    result = evaluate(model, lambda: data.make_env(), episodes=100, seed=1)
    assert result.return_mean >= 475


def test_recorded_data_serves_all_stages(tmp_path: Path) -> None:
    """V, M and C, with an evolution in the dream, and no environment at all."""
    recording = tmp_path / "data"
    collect(lambda: make_env(Walk), "Walk", [Part("random")], Amount("episodes", 6), recording)
    torch.manual_seed(0)
    data = OfflineDataModule(str(recording), batch_size=4, sequence_length=4)
    model = WorldModels(data.spec, **TINY)
    stages = []
    watch = Watch(lambda t, m: stages.append(m.clock.stage))
    trainer = pl.Trainer(
        max_steps=ROUND, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[watch],
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert list(dict.fromkeys(stages)) == ["vision", "memory", "controller"]
    assert model.has_evolved
    assert model.env_steps == 0
    assert all(value.isfinite().all() for value in model.state_dict().values())
