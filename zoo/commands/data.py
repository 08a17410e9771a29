"""`zoo data`: records what policies do, tells what is in recorded data, and converts it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.errors import UserError
from datamodules.progress import Progress
from zoo.commands.options import Parser
from zoo.commands.output import facts

if TYPE_CHECKING:
    from zoo.collecting import Amount, Part

HELP = "record, inspect and convert data: collect ENV, inspect DATA, convert DATA PATH"
FORMATS = ("store", "minari", "hdf5", "lerobot", "video", "gif")
ENDINGS = {".hdf5": "hdf5", ".h5": "hdf5", ".mp4": "video", ".gif": "gif"}
DATA = "a Minari id or folder, an HDF5 file, a store, a run, videos, or a LeRobot folder"
EPILOG = f"""\
DATA is {DATA}.

examples:
  zoo data collect CartPole-v1 --policy random --episodes 100 --out data/random
  zoo data collect CartPole-v1 --policy random RUN sb3:ppo.zip --mix 1 1 2 --steps 30000 --out DIR
  zoo data inspect DIR
  zoo data convert DIR cartpole.hdf5
  zoo data inspect VIDEOS --size 64 --preview frames.png
  zoo data convert DIR videos --format video
"""
BAR = 30


def main(argv: list[str]) -> int:
    """Runs one of the three; `inspect` returns 1 if it finds problems."""
    options = _parser().parse_args(argv)
    return options.run(options)


def _parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="zoo data", description=HELP, epilog=EPILOG, formatter_class=raw)
    verbs = parser.add_subparsers(metavar="collect | inspect | convert", required=True)

    add = verbs.add_parser("collect", help="record policies in an environment")
    add.set_defaults(run=_collect)
    add.add_argument("env", metavar="ENV", help="a gymnasium id, dm_control/..., ale/...")
    add.add_argument(
        "--policy",
        nargs="+",
        default=["random"],
        metavar="POLICY",
        help="random, a run or checkpoint, or sb3:FILE; several are a mixture (random)",
    )
    add.add_argument("--mix", nargs="+", type=float, help="share of each policy (equal)")
    add.add_argument(
        "--epsilon", nargs="+", type=float, help="share of random actions of each policy (0)"
    )
    add.add_argument("--greedy", action="store_true", help="best actions instead of samples")
    amount = add.add_mutually_exclusive_group(required=True)
    amount.add_argument("--steps", type=int, help="so many steps, rounded up to whole episodes")
    amount.add_argument("--episodes", type=int, help="so many episodes")
    add.add_argument("--out", type=Path, required=True, metavar="PATH", help="where to")
    _format_option(add)
    add.add_argument("--resume", action="store_true", help="go on with what is there")
    add.add_argument("--seed", type=int, default=0, help="of environments and noise (0)")
    add.add_argument("--num-envs", type=int, default=8, help="environments side by side (8)")
    add.add_argument(
        "--workers", choices=("sync", "async"), default="sync", help="async: a process each (sync)"
    )
    add.add_argument("--action-repeat", type=int, default=1, help="frames per action (1)")
    add.add_argument("--size", type=int, help="side of images in pixels")
    add.add_argument("--time-limit", type=int, help="steps after which episodes are cut")
    add.add_argument(
        "--env-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="of the environment; yaml"
    )

    look = verbs.add_parser("inspect", help="what is in recorded data, and whether it is whole")
    look.set_defaults(run=_inspect)
    look.add_argument("data", metavar="DATA", help=DATA)
    look.add_argument("--json", action="store_true", help="print one JSON object")
    look.add_argument("--preview", type=Path, metavar="PNG", help="write a picture of its images")
    _decoding_options(look)

    convert = verbs.add_parser("convert", help="write recorded data in another format")
    convert.set_defaults(run=_convert)
    convert.add_argument("data", nargs="+", metavar="DATA", help=f"{DATA}; several are joined")
    convert.add_argument("path", type=Path, metavar="PATH", help="where to")
    _format_option(convert)
    convert.add_argument("--id", help="of a Minari data set (from PATH)")
    convert.add_argument("--observations", nargs="+", metavar="KEY", help="only these (all)")
    _decoding_options(convert)
    convert.add_argument(
        "--errors",
        choices=("stop", "skip"),
        default="stop",
        help="what to do about videos that cannot be read (stop)",
    )
    convert.add_argument("--lossless", action="store_true", help="keep every bit in videos")
    convert.add_argument(
        "--clip-actions", action="store_true", help="bring actions out of bounds to the bounds"
    )
    return parser


def _format_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", "--to", help=f"{', '.join(FORMATS)} (by the ending of PATH; store)"
    )


def _decoding_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, help="resize images to this side in pixels")
    parser.add_argument("--crop", action="store_true", help="cut videos to squares before")
    parser.add_argument(
        "--ingest",
        type=Path,
        metavar="DIR",
        help="where videos are decoded to, once (a folder below the user's cache)",
    )


def _collect(options: argparse.Namespace) -> int:
    kind = _format(options.format, options.out)
    if kind in ("video", "gif"):
        raise UserError(
            f"'{options.out}' would hold no actions: collect a store, and `zoo data convert` that"
        )
    parts, amount = _mixture(options), _amount(options)

    # Imported here: torch takes seconds, and a mistake in the options should show at once.
    import torch

    from datamodules.envs.factory import make_env
    from datamodules.sources.opening import open_source
    from datamodules.sources.writing import must_be_free, write
    from zoo.collecting import collect

    torch.set_num_threads(1)
    out: Path = options.out
    # Other formats cannot grow, so the data is recorded into a store beside them first.
    store = out if kind == "store" else out.with_name(f".{out.name}.collecting")
    if kind != "store":
        must_be_free(out)
    asked = {key: getattr(options, key) for key in ("action_repeat", "size", "time_limit")}
    asked |= _env_kwargs(options.env_kwargs)
    make = partial(make_env, options.env, **asked)
    progress = Progress()
    collect(
        make,
        options.env,
        parts,
        amount,
        store,
        seed=options.seed,
        num_envs=options.num_envs,
        workers=options.workers,
        resume=options.resume,
        tick=progress.show,
        options={key: value for key, value in asked.items() if value is not None},
    )
    progress.end()
    source = open_source(store)
    if kind != "store":
        write(source, out, kind)
        shutil.rmtree(store)
    print(
        f"'{out}' holds {source.num_episodes} episodes of {options.env}: `zoo data inspect {out}`"
    )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from datamodules.inspection import describe, save_preview
    from datamodules.sources.opening import open_source

    source = open_source(
        options.data,
        size=options.size,
        crop=options.crop,
        ingest=options.ingest,
        errors="skip",  # they are listed as problems
    )
    about = describe(source)
    if options.preview is not None:
        save_preview(source, options.preview)
        about["preview"] = str(options.preview)
    if options.json:
        print(json.dumps(about))
    else:
        _print(about)
    return 1 if about["problems"] else 0


def _convert(options: argparse.Namespace) -> int:
    from datamodules.sources.opening import open_source
    from datamodules.sources.source import said
    from datamodules.sources.writing import left_out, must_be_free, write

    kind = _format(options.format, options.path)
    if options.lossless and kind not in ("video", "lerobot"):
        raise UserError(f"--lossless is for video and lerobot, not for {kind}")
    if options.id is not None and kind != "minari":
        raise UserError(f"--id {options.id} is for Minari data sets, not for a {kind}")
    must_be_free(options.path)
    source = open_source(
        options.data,
        options.observations,
        options.size,
        crop=options.crop,
        ingest=options.ingest,
        errors=options.errors,
    )
    lost = left_out(source, kind)
    progress = Progress()
    write(
        source,
        options.path,
        kind,
        clip=options.clip_actions,
        dataset_id=options.id,
        lossless=options.lossless,
        tick=partial(progress.show, "episodes"),
    )
    progress.end()
    for note in [*said(source), *lost]:
        print(f"zoo: {note}", file=sys.stderr)
    print(f"'{options.path}' holds {source.num_episodes} episodes as {kind}")
    return 0


def _format(named: str | None, path: Path) -> str:
    """The format that is asked for, or that the path's ending says."""
    if named is None:
        named = ENDINGS.get(path.suffix.lower(), "store")
    if named not in FORMATS:
        raise UserError(f"there is no format '{named}': choose {', '.join(FORMATS)}")
    return named


def _mixture(options: argparse.Namespace) -> list[Part]:
    from zoo.collecting import Part

    count = len(options.policy)
    mix = options.mix or [1.0] * count
    epsilon = options.epsilon or [0.0] * count
    epsilon = epsilon * count if len(epsilon) == 1 else epsilon
    for name, values in (("--mix", mix), ("--epsilon", epsilon)):
        if len(values) != count:
            raise UserError(f"{name} has {len(values)} numbers for {count} policies: give one each")
    return [
        Part(policy, share, noise, options.greedy)
        for policy, share, noise in zip(options.policy, mix, epsilon, strict=True)
    ]


def _amount(options: argparse.Namespace) -> Amount:
    from zoo.collecting import Amount

    if options.steps is not None:
        return Amount("steps", options.steps)
    return Amount("episodes", options.episodes)


def _env_kwargs(pairs: list[str]) -> dict[str, Any]:
    import yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--env-kwargs '{pair}' is not KEY=VALUE")
        found[key] = yaml.safe_load(value)
    return found


def _print(about: dict[str, Any]) -> None:
    """The description for people."""
    length, earned, acting = about["length"], about["return"], about["spec"]["action"] is not None
    ended = f", of which the task ended {about['terminal']:,}" if acting else ""
    pairs = [
        ("data", f"{about['name']} ({about['kind']})"),
        ("environment", about["env"] or "not said"),
        ("spaces", about["spec_text"]),
        ("episodes", f"{about['episodes']:,}{ended}"),
        ("steps", f"{about['steps']:,}; an episode has {_spread(length)}"),
    ]
    if acting:
        pairs.append(("returns", _spread(earned) if earned else "none could be read"))
    for key, (height, width, channels) in about["images"].items():
        pairs.append((f"'{key}'", f"{width} x {height} pixels, {channels} channels"))
    if about["fps"]:
        pairs.append(("frames/s", _spread(about["fps"])))
    for name, policy in about["policies"].items():
        pairs.append((f"by {name}", f"{policy['episodes']:,}, return {policy['return_mean']:.2f}"))
    checksums = {"ok": "all fit", "damaged": "DAMAGED", "none": "the format has none"}
    original = f", decoded from {about['original_bytes'] / 1e6:,.2f} MB"
    decoded = original if about["original_bytes"] else ""
    pairs.append(("on disk", f"{about['bytes'] / 1e6:,.2f} MB{decoded}"))
    pairs.append(("checksums", checksums[about["checksums"]]))
    if "preview" in about:
        pairs.append(("preview", about["preview"]))
    facts(pairs)
    counts, edges = about["histogram"]["counts"], about["histogram"]["edges"]
    if counts:
        print()
    for i, count in enumerate(counts):
        bar = "#" * round(BAR * count / max(counts))
        print(f"{edges[i]:>10.2f} .. {edges[i + 1]:<10.2f} {count:>6} {bar}".rstrip())
    for kind, sentences in (("note", about["notes"]), ("problem", about["problems"])):
        for sentence in sentences:
            print(f"{kind}: {sentence}")


def _spread(of: dict[str, float]) -> str:
    return f"{of['mean']:.2f} +- {of['std']:.2f}, from {of['min']:.2f} to {of['max']:.2f}"
