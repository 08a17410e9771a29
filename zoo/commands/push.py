"""`zoo push`: publishes an exported folder on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from datamodules.errors import UserError
from zoo.commands.options import Parser
from zoo.runs import HUB_ID, IDENTITY, WEIGHTS

HELP = "publish an exported folder on the Hugging Face hub"


def main(argv: list[str]) -> int:
    """Uploads the folder to a repository, which is made if it is not there."""
    parser = Parser(prog="zoo push", description=HELP)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that `zoo export` wrote")
    parser.add_argument("hub_id", metavar="HUB_ID", help="ORGANISATION/NAME")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    options = parser.parse_args(argv)

    for name in ("config.json", WEIGHTS, IDENTITY, "README.md"):
        if not (options.folder / name).is_file():
            raise UserError(f"'{options.folder}' has no {name}: make it with `zoo export RUN DIR`")
    if not HUB_ID.fullmatch(options.hub_id):
        raise UserError(f"'{options.hub_id}' is not a hub id: write ORGANISATION/NAME")

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        hub = HfApi()
        hub.create_repo(options.hub_id, private=options.private, exist_ok=True)
        commit = hub.upload_folder(repo_id=options.hub_id, folder_path=options.folder)
    except LocalTokenNotFoundError as error:
        raise UserError("the hub does not know you: log in with `hf auth login`") from error
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the hub did not take '{options.folder}': {reason}") from error
    print(commit.commit_url)
    return 0
