import numpy as np
import pytest
import pytorch_lightning as pl
from callback_standins import PerfectDreamer, TinyData, TinyModel, rows, trainer, walk_spec
from PIL import Image

from callbacks.budget import Budget
from callbacks.dream_video import DreamVideo
from callbacks.pictures import BORDER, DREAMED, ENDED, FILTERED, MIN_HEIGHT, PLOT_SIZE, dream_frames
from datamodules.errors import UserError


@pytest.mark.parametrize("image", [False, True])
def test_videos_are_written(tmp_path, image):
    video = DreamVideo(every_env_steps=4, context=3, horizon=9, episodes=2)
    model, data = PerfectDreamer(walk_spec(image)), TinyData(image=image)
    trainer(tmp_path, video, Budget(env_steps=8)).fit(model, data)
    key = "image" if image else "vector"
    files = sorted(p.name for p in (tmp_path / "videos").iterdir())
    assert files == [f"dream-{key}-4.gif", f"dream-{key}-8.gif"]
    height, width = (MIN_HEIGHT, MIN_HEIGHT) if image else PLOT_SIZE
    gif = Image.open(tmp_path / "videos" / files[0])
    assert gif.n_frames == 12
    assert gif.size == (2 * (width + 2 * BORDER), 3 * (height + 2 * BORDER))
    assert [r[2] for r in rows(tmp_path, but=("train/",))] == ["time/dream_video_s"] * 2


def test_short_episodes_make_short_videos_or_none():
    seed = np.random.SeedSequence(0)
    video = DreamVideo(context=5, horizon=100)
    frames = video.film(PerfectDreamer(), TinyData().make_env, seed)["vector"]
    assert len(frames) == 41
    video = DreamVideo(context=41, horizon=100)
    assert video.film(PerfectDreamer(), TinyData().make_env, seed) == {}


def test_frames_of_images():
    truth = np.full((1, 4, 96, 96, 1), 0.25, np.float32)
    dream = truth.copy()
    dream[:, 2] = 0.75
    frames = dream_frames(truth, dream, np.array([3]), context=2)
    assert frames.shape == (4, 300, 100, 3)
    centres = frames[:, [50, 150, 250], 50, 0].tolist()
    ended = [ENDED] * 3
    assert centres == [[64, 64, 128], [64, 64, 128], [64, 191, 191], ended]
    borders = frames[:, 100, 50].tolist()
    assert borders == [list(FILTERED)] * 2 + [list(DREAMED)] * 2
    assert not frames[:, [0, 200], 50].any()


def test_curves_grow_and_stay_in_their_panel():
    time = np.arange(20.0)
    truth = np.stack([np.sin(time), 1e6 * np.cos(time), np.zeros(20)], -1)[None]
    dream = truth.copy()
    dream[0, 10:] = 1e12  # an exploding dream must not hide the rest
    frames = dream_frames(truth, dream, np.array([20]), context=5).astype(int)
    ink = (np.abs(frames[1:] - frames[:-1]).sum(-1) > 0).reshape(19, 3, 100, -1).sum((2, 3))
    assert (ink > 0).all()
    perfect = dream_frames(truth, truth, np.array([20]), context=5)
    assert np.array_equal(perfect[:, 2:98, 2:-2], perfect[:, 102:198, 2:-2])


def test_what_cannot_be_filmed_is_refused(tmp_path):
    with pytest.raises(UserError, match="Imaginer"):
        trainer(tmp_path, DreamVideo()).fit(TinyModel(), TinyData())
    t = pl.Trainer(default_root_dir=tmp_path, logger=False, callbacks=[DreamVideo()])
    with pytest.raises(UserError, match="needs a RunLogger"):
        t.fit(PerfectDreamer(), TinyData())
    with pytest.raises(UserError, match="context is 0"):
        DreamVideo(context=0)
