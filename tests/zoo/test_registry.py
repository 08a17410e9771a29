"""The catalogue: names, cards, presets and building models by name."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import zoo
from datamodules import ActionSpec, ArraySpec, Spec, UserError
from zoo import registry

SPEC = Spec({"vector": ArraySpec((3,), "float32")}, ActionSpec("discrete", nvec=(2,)))
BUILT_IN = [
    "decision-transformer",
    "diamond",
    "dreamer-v1",
    "dreamer-v2",
    "dreamer-v3",
    "genie",
    "i-jepa",
    "jepa-wm",
    "planet",
    "v-jepa",
    "world-models",
]

THIRD_PARTY = """
from dataclasses import replace

from zoo.base import ZooModel
from zoo.dreamer_v3.card import CARD as OURS


class Toy(ZooModel):
    name = "toy"

    def __init__(self, spec, width: int = 3, depth: int = 1) -> None:
        super().__init__(spec)
        self.keep_hyperparameters(locals())


CARD = replace(OURS, name="toy", class_path="thirdparty.card:Toy", can=())
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of another package, with the presets `wide` and `deep`."""
    package = tmp_path / "thirdparty"
    (package / "presets").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "card.py").write_text(THIRD_PARTY)
    (package / "presets" / "wide.yaml").write_text(
        "# Wide and\n# shallow\nmodel:\n  init_args:\n    width: 7\n    depth: 2\n"
    )
    (package / "presets" / "deep.yaml").write_text("data: {}\n")
    _entry_points(monkeypatch, ("toy", "thirdparty.card:CARD"))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("thirdparty.card", "thirdparty"):
        sys.modules.pop(name, None)


def _entry_points(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    found = [EntryPoint(name, value, "zoo.models") for name, value in points]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    registry._catalogue.cache_clear()


@pytest.fixture(autouse=True)
def _own_catalogue():
    yield
    registry._catalogue.cache_clear()


def test_patterns_choose_models(toy: None) -> None:
    assert zoo.list_models("dreamer*") == ["dreamer-v1", "dreamer-v2", "dreamer-v3"]
    assert zoo.list_models() == sorted([*BUILT_IN, "toy"])
    assert zoo.list_models("nothing*") == []


def test_another_package_brings_its_model_and_presets(toy: None) -> None:
    assert registry.presets("toy") == ["deep", "wide"]
    assert registry.preset_summary("toy/wide") == "Wide and"
    assert registry.preset_summary("toy/deep") == ""
    assert registry.card("toy/wide").name == "toy"
    assert registry.name_of("thirdparty.card.Toy") == "toy"
    assert registry.name_of("thirdparty.card.Other") is None


def test_create_takes_the_presets_settings_and_options_win(toy: None) -> None:
    assert dict(zoo.create("toy", SPEC).hparams) == {"spec": SPEC.to_dict(), "width": 3, "depth": 1}
    model = zoo.create("toy/wide", spec=SPEC, depth=5)
    assert (model.hparams.width, model.hparams.depth) == (7, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toi", "unknown model 'toi' \\(did you mean 'toy'\\?\\)"),
        ("dreamer-v4/wide", "unknown model 'dreamer-v4' \\(did you mean 'dreamer-v3' or "),
        ("toy/wid", "unknown preset of toy 'wid' \\(did you mean 'wide'\\?\\)"),
        (
            "xxxx",
            f"unknown model 'xxxx' \\(there is {', '.join(sorted([*BUILT_IN, 'toy']))}\\)",
        ),
    ],
)
def test_unknown_names_come_with_the_nearest(toy: None, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        zoo.create(name, SPEC)


def test_unknown_options_come_with_the_nearest(toy: None) -> None:
    with pytest.raises(
        UserError, match=r"unknown option of toy 'widht' \(did you mean 'width'\?\)"
    ):
        zoo.create("toy", SPEC, widht=2)


def test_a_model_alone_names_no_preset(toy: None) -> None:
    with pytest.raises(UserError, match="choose one of toy/deep, toy/wide"):
        registry.preset_path("toy")


def test_a_broken_package_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _entry_points(
        monkeypatch,
        ("gone", "no_such_package.card:CARD"),
        ("odd", "zoo.registry:BUILT_IN"),
        ("again", "zoo.dreamer_v3.card:CARD"),
    )
    with pytest.warns(UserWarning, match="is left out") as warned:
        assert zoo.list_models() == BUILT_IN
    messages = [str(w.message) for w in warned]
    assert any("'gone'" in m and "no_such_package" in m for m in messages)
    assert any("'odd'" in m and "not a ModelCard" in m for m in messages)
    assert any("the name is taken" in m for m in messages)


def test_import_object_keeps_the_errors_of_the_module_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        registry.import_object("needs_more:Thing")
    with pytest.raises(UserError, match="no module 'nowhere'"):
        registry.import_object("nowhere.at_all:Thing")
    with pytest.raises(UserError, match=r"zoo.registry has no 'Thing'"):
        registry.import_object("zoo.registry.Thing")


@pytest.mark.parametrize("name", zoo.list_models())
def test_cards_hold_what_they_claim(name: str) -> None:
    from zoo.base import capabilities

    card = zoo.card(name)
    cls = registry.model_class(name)
    assert cls.name == card.name == name
    assert set(card.can) == set(capabilities(cls))
    assert registry.name_of(f"{cls.__module__}.{cls.__qualname__}") == name
    for preset in registry.presets(name):
        assert registry.preset_summary(f"{name}/{preset}"), f"{preset}.yaml has no first comment"


def test_sizes_on_the_card_are_those_of_the_model() -> None:
    from zoo.dreamer_v3.module import SIZES

    assert set(zoo.card("dreamer-v3").sizes) == set(SIZES)
