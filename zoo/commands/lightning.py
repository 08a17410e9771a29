"""The LightningCLI behind `zoo fit`: typed options, and model and data built to fit each other."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from datamodules.errors import UserError
from zoo import registry
from zoo.base import ZooModel


class ZooCLI(LightningCLI):
    """A LightningCLI that gives the data's spec to the model and keeps a section `zoo`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what a run says about itself, and the link from the data to the model."""
        parser.add_argument("--zoo.model", type=str | None, help="name in the catalogue")
        parser.add_argument("--zoo.preset", type=str | None, help="preset, or environment")
        parser.add_argument("--zoo.weights", type=str | None, help="weights to start from")
        parser.add_argument("--zoo.threads", type=int, default=1, help="CPU threads of torch")
        parser.link_arguments("data.spec", "model.init_args.spec", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses without Lightning's warning that the arguments are not those of the process."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _add_instantiators(self) -> None:
        """Leaves the hyper-parameters to the models, who save them whole: with their spec."""

    def complete_config(self) -> str:
        """The configuration as yaml, from which the same run can be made."""
        return self.parser.dump(self.config, skip_none=False)


def build(config: dict[str, Any], options: list[str]) -> ZooCLI:
    """Parses options over a configuration and builds data, model and trainer.

    Raises:
        UserError: an option or a setting that does not exist or has the wrong type, or what the
            data, the model or the trainer say about their arguments.
    """
    try:
        return ZooCLI(
            ZooModel,
            pl.LightningDataModule,
            save_config_callback=None,
            parser_kwargs={"exit_on_error": False, "prog": "zoo fit"},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=["--config", yaml.safe_dump(config), *options],
            run=False,
            auto_configure_optimizers=False,
        )
    except argparse.ArgumentError as error:
        raise UserError(sentence(str(error))) from error
    except MisconfigurationException as error:
        raise UserError(f"the trainer's settings do not work here: {error}") from error
    except ValueError as error:
        raise _users_mistake(error) or error from None


def sentence(message: str) -> str:
    """What a message of jsonargparse says, without the types that it tried, in one line."""
    key = re.search(r'Parser key "([^"]+)"', message)
    reasons = [line.strip(" -") for line in message.splitlines()]
    noise = (
        "Parser key",
        "Does not validate",
        "Subtypes",
        "Errors:",
        "Given value",
        "Expected a <class 'NoneType'>",
        "Expected a path",
    )
    reason = " ".join(r for r in reasons if r and not r.startswith(noise))
    reason = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", reason)
    return (f"{key[1]}: " if key else "") + reason + _nearest_option(reason)


def _nearest_option(reason: str) -> str:
    """A hint where an argument of a class is misspelt."""
    found = re.search(r"class_path '([\w.]+)':.*Option '(\w+)'", reason)
    if not found:
        return ""
    arguments = list(inspect.signature(registry.import_object(found[1])).parameters)
    near = difflib.get_close_matches(found[2], arguments, n=2)
    return f": did you mean {' or '.join(map(repr, near))}?" if near else ""


def _users_mistake(error: BaseException | None) -> UserError | None:
    """The UserError that jsonargparse wrapped in an error of its own, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
