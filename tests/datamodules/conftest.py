"""Makes the helpers of this folder importable by its tests; folders that several of them need."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is left in the user's cache folder."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five videos."""
    from videos import picture, video  # importable since the path was extended above

    path = tmp_path / "videos"
    path.mkdir()
    for n in range(5):
        video(path / f"{n}.mkv", picture(n + 2, seed=n))
    return path
