"""What is in recorded data: the `inspect` of `zoo data`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.errors import UserError
from datamodules.sources.opening import kind_of
from datamodules.sources.source import Joined, Source, said, steps
from datamodules.sources.stores import StoreSource
from datamodules.sources.video_files import as_rgb

BINS = 10
MOST_PROBLEMS = 20


def describe(source: Source) -> dict[str, Any]:
    """Reads all of some recorded data and describes it, as plain data.

    Returns:
        `name`, `kind`, `env`, `policies` (returns of each, where a store knows who acted), `spec`
        (and `spec_text`), `episodes`, `steps` (actions), `terminal` (episodes that the task ended),
        `length` and `return` (`mean`, `std`, `min`, `max`; none of video), `histogram` of the
        returns (`edges`, `counts`), `images` (shape of each), `fps` (as `length`), `bytes` on disk,
        `original_bytes` of what was decoded into a store, `checksums` ("ok", "damaged", or "none"
        where the format has none), `notes`, and `problems`: one sentence for each episode that
        cannot be used.
    """
    problems = [sentence for part in _parts(source) for sentence in getattr(part, "broken", [])]
    returns, terminal, good = [], 0, []
    for episode in range(source.num_episodes):
        try:
            found = steps(source, episode)
        except UserError as error:
            problems.append(str(error))
            if len(problems) >= MOST_PROBLEMS:
                problems.append("and maybe more: the rest was not read")
                break
            continue
        terminal += int(found["is_terminal"][-1])
        if "reward" in found:
            good.append(episode)
            returns.append(float(found["reward"].sum(dtype=np.float64)))
    about: dict[str, Any] = {
        "name": source.name,
        "kind": kind_of(source),
        "env": source.env,
        "policies": _policies(source, dict(zip(good, returns, strict=True))),
        "spec": source.spec.to_dict(),
        "spec_text": str(source.spec),
        "episodes": source.num_episodes,
        "steps": source.num_actions,
        "terminal": terminal,
        "length": _moments(source.lengths),
        "return": _moments(np.array(returns)),
        "histogram": _histogram(np.array(returns)),
        "images": {key: list(source.spec.obs[key].shape) for key in source.spec.images},
        "fps": {} if source.fps is None else _moments(source.fps[np.isfinite(source.fps)]),
        "original_bytes": sum(getattr(part, "original", 0) for part in _parts(source)),
        "bytes": sum(_on_disk(file) for file in _all_files(source)),
        "notes": said(source),
        "problems": problems,
    }
    about["checksums"] = _checksums(source, problems)
    return about


def preview(source: Source, rows: int = 4, columns: int = 8) -> np.ndarray:
    """A picture uint8 (H, W, 3): one row for each of some episodes, with steps evenly spread.

    Raises:
        UserError: there are no images.
    """
    keys = source.spec.images
    if not keys:
        raise UserError(f"{source.name} has no images to show: its observations are {source.spec}")
    chosen = np.linspace(0, source.num_episodes - 1, min(rows, source.num_episodes)).astype(int)
    lines = []
    for episode in np.unique(chosen):
        images = steps(source, int(episode))[f"obs/{keys[0]}"]
        some = images[np.linspace(0, len(images) - 1, columns).astype(int)]
        lines.append(np.concatenate(list(as_rgb(some)), 1))
    return np.concatenate(lines, 0)


def save_preview(source: Source, path: Path) -> None:
    """Writes `preview` as a PNG file."""
    picture = Image.fromarray(preview(source))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, "PNG")
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error


def _policies(source: Source, returns: Mapping[int, float]) -> dict[str, dict[str, float]]:
    """Episodes and mean return of each policy, where the store says who acted."""
    if not isinstance(source, StoreSource):
        return {}
    attributes = source.store.attributes
    names = attributes.get("policies")
    if names is None:
        alone = attributes.get("policy")
        return {alone: _summary(list(returns.values()))} if alone else {}
    by_stream: dict[int, list[float]] = {stream: [] for stream in range(len(names))}
    for episode, value in returns.items():
        by_stream.setdefault(source.stream(episode), []).append(value)
    return {name: _summary(by_stream[stream]) for stream, name in enumerate(names)}


def _summary(returns: list[float]) -> dict[str, float]:
    return {"episodes": len(returns), "return_mean": float(np.mean(returns)) if returns else 0.0}


def _moments(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def _histogram(returns: np.ndarray) -> dict[str, list[float]]:
    if not len(returns):
        return {"edges": [], "counts": []}
    counts, edges = np.histogram(returns, BINS)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _checksums(source: Source, problems: list[str]) -> str:
    """Checks every byte of stores, and adds what is wrong to the problems."""
    stores = [part for part in _parts(source) if isinstance(part, StoreSource)]
    state = "ok" if stores else "none"
    for part in stores:
        try:
            part.store.verify()
        except UserError as error:
            state = "damaged"
            if str(error) not in problems:
                problems.append(str(error))
    return state


def _parts(source: Source) -> list[Source]:
    return source.parts if isinstance(source, Joined) else [source]


def _all_files(source: Source) -> list[Path]:
    """With the chunks, which `files` leaves to the journal."""
    files: list[Path] = []
    for part in _parts(source):
        if isinstance(part, StoreSource):
            files += [path for path in part.path.rglob("*") if path.is_file()]
        else:
            files += part.files()
    return files


def _on_disk(file: Path) -> int:
    """Bytes that a file takes: the chunks of a store have holes until they are full."""
    state = file.stat()
    return min(state.st_size, 512 * getattr(state, "st_blocks", 1 << 40))
