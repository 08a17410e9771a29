import io
from types import SimpleNamespace

import numpy as np
import pytest
from callback_standins import TinyData, TinyModel, rows, trainer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.budget import Budget
from callbacks.logger import RunLogger, encode_gif


def events(run):
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def test_floats_come_back_bit_for_bit(tmp_path):
    logger = RunLogger(tmp_path)
    values = [0.1, float(np.float32(0.1)), 1e-300, -0.0, float("inf"), 3]
    for step, value in enumerate(values):
        logger.log_metrics({"x": value, "epoch": 9}, step)
    logger.finalize("success")
    read = rows(tmp_path)
    assert [r[:3] for r in read] == [[str(i), "0", "x"] for i in range(6)]
    assert [np.float64(r[3]).tobytes() for r in read] == [np.float64(v).tobytes() for v in values]


def test_rows_are_buffered_and_rewound(tmp_path):
    logger = RunLogger(tmp_path)
    logger.log_metrics({"x": 1.0}, 1)
    assert not (tmp_path / "metrics.csv").exists()
    state = logger.state_dict()
    assert state["offset"] == (tmp_path / "metrics.csv").stat().st_size
    logger.log_metrics({"x": 2.0}, 2)
    logger.flush()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,0,x,3.")  # torn by a crash

    resumed = RunLogger(tmp_path)
    resumed.load_state_dict(state)
    resumed.log_metrics({"x": 4.0}, 2)
    resumed.finalize("success")
    assert rows(tmp_path) == [["1", "0", "x", "1.0"], ["2", "0", "x", "4.0"]]


def test_a_run_that_starts_anew_replaces_the_rows(tmp_path):
    (tmp_path / "metrics.csv").write_text("updates,env_steps,metric,value\n1,1,old,1.0\n")
    logger = RunLogger(tmp_path)
    logger.log_metrics({"new": 1.0}, 1)
    logger.finalize("success")
    logger.log_metrics({"new": 2.0}, 2)  # but the same logger goes on where it was
    logger.finalize("success")
    assert [r[2:] for r in rows(tmp_path)] == [["new", "1.0"], ["new", "2.0"]]


def test_a_file_that_lost_rows_is_said(tmp_path):
    logger = RunLogger(tmp_path)
    logger.load_state_dict({"offset": 1000, "step": 3})
    with pytest.warns(UserWarning, match="holds 0 bytes but the checkpoint recorded 1000"):
        logger.flush()


def test_charts_have_env_steps_on_the_axis(tmp_path):
    t = trainer(tmp_path, Budget(updates=11))
    t.fit(TinyModel(), TinyData())
    assert [e.step for e in events(tmp_path).Scalars("train/loss")] == [10, 20]
    assert [r[:2] for r in rows(tmp_path) if r[2] == "train/loss"] == [["5", "10"], ["10", "20"]]


def test_charts_drop_what_came_after_the_checkpoint(tmp_path):
    fake = SimpleNamespace(
        default_root_dir=tmp_path,
        training=False,
        is_global_zero=True,
        lightning_module=SimpleNamespace(updates=1, env_steps=10),
    )
    logger = RunLogger()
    logger.attach(fake)
    logger.write({"x": 1.0})
    state = logger.state_dict()
    fake.lightning_module.env_steps = 20
    logger.write({"x": 2.0})
    logger.finalize("killed")
    resumed = RunLogger()
    resumed.attach(fake)
    resumed.load_state_dict(state)
    resumed.write({"x": 3.0})
    resumed.finalize("success")
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("x")] == [(10, 1.0), (20, 3.0)]


def test_gif_file_and_summary(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (7, 20, 30, 3), dtype=np.uint8)
    logger = RunLogger(tmp_path)
    logger.log_gif("dream/image", frames, 120)
    logger.finalize("success")
    path = tmp_path / "videos" / "dream-image-120.gif"
    gif = Image.open(path)
    assert (gif.n_frames, gif.size) == (7, (30, 20))
    (summary,) = events(tmp_path).Images("dream/image")
    assert summary.step == 120
    assert summary.encoded_image_string == path.read_bytes()


def test_gif_shows_equal_frames_for_their_whole_time():
    frames = np.zeros((6, 8, 8, 3), np.uint8)
    frames[3:] = 255
    gif = Image.open(io.BytesIO(encode_gif(frames)))
    duration = 0
    for index in range(gif.n_frames):
        gif.seek(index)
        duration += gif.info["duration"]
    assert duration == 600
