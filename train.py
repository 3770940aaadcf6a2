"""Train a model: `python train.py model=rwkv size=nano data=stdlib ...` (docs/training.md).

Hydra puts the configuration together from conf/ and the command line, and runs sweeps (-m); past this file there are
plain dictionaries only.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.errors import ZooError

CONF = Path(__file__).resolve().parent / "conf"


class Held(io.StringIO):
    """What Hydra prints of an error, held back; `behind` is the stream it was meant for."""

    def __init__(self) -> None:
        super().__init__()
        self.behind = sys.stderr


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def job(composed: DictConfig) -> dict[str, Any]:
    """One run: the only one, or one of a sweep's."""
    with contextlib.redirect_stderr(getattr(sys.stderr, "behind", sys.stderr)):
        config: Any = OmegaConf.to_container(composed, resolve=True)
        config.pop("rates", None)  # a table to look optim.lr up in, which it has been
        context = HydraConfig.get()
        if context.mode == RunMode.MULTIRUN:
            from zoo.training.sweep import finished, job_folder

            swept = config.pop("swept", [])
            config["out"] = job_folder(config["out"] or context.sweep.dir, list(context.overrides.task), swept)
        try:
            if context.mode == RunMode.MULTIRUN and (result := finished(config)) is not None:
                print(f"finished before: {config['out']}", flush=True)
                return result
            from zoo.training import ahead
            from zoo.training.optional import hidden

            ahead.begin(config)
            with hidden():
                from zoo.training.run import train  # Lightning: seconds that a wrong option need not cost

            return train(config)
        except ZooError as error:
            if context.mode == RunMode.MULTIRUN:  # the other jobs go on; `main` sees the first error when all are done
                print(f"error: {config['out']}: {error}", file=sys.stderr, flush=True)
            raise


def main() -> int:
    """Run, with errors in one line: a user's mistake is status 2, as in the `zoo` command."""
    said = Held()
    if swept := swept_keys(sys.argv[1:]):  # a job, in whatever process, is told its own values alone
        sys.argv.append(f"+swept=[{','.join(swept)}]")
    try:
        with contextlib.redirect_stderr(said):
            job()
        return 0
    except SystemExit as exit_:
        error = exit_.__context__
        if exit_.code == 2 and (lines := said.getvalue().splitlines()):  # a word that starts with -, and the usage
            print("error:", lines[-1].partition("error: ")[2], file=sys.stderr)
            return 2
        if exit_.code != 1 or not isinstance(error, Exception):
            sys.stderr.write(said.getvalue())
            raise
    except Exception as other:
        error = other
    if isinstance(error, BrokenPipeError):  # whoever read what a run says has left; nothing more may go into that pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if isinstance(error, ZooError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, HydraException | OmegaConfBaseException) or of_hydra(error):
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    traceback.print_exception(error, file=sys.stderr)
    return 1


def swept_keys(words: list[str]) -> list[str]:
    """What a sweep varies: the keys and groups that the command line gives more than one value."""
    if not {"-m", "--multirun"} & set(words):
        return []
    try:
        overrides = OverridesParser.create().parse_overrides([word for word in words if "=" in word[1:]])
    except HydraException:
        return []  # Hydra will say what is wrong
    return [override.key_or_group for override in overrides if override.is_sweep_override()]


def of_hydra(error: Exception) -> bool:
    """Whether Hydra refused a word with an error of no kind of its own, as it does for size=5."""
    places = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, ValueError) and places[-1].startswith("hydra.")


def one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's messages, which have many lines, as one that says what is allowed."""
    text = str(error)
    if found := re.search(r"Could not find '([^']+)/([^'/]*)'", text):
        options = re.search(r"Available options in '[^']*':\s*(.*?)(?:\n\S|\Z)", text, re.DOTALL)
        allowed = ", ".join(options[1].split()) if options else "see conf/"
        return f"unknown {found[1]} {found[2]!r}; allowed: {allowed}"
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"unknown key {found[1]}; allowed: {', '.join(keys_beside(found[1]))}"
    return " ".join(text.split())


def keys_beside(key: str) -> list[str]:
    """What could have stood in place of an unknown key, with the groups that the command line chose."""
    groups = [word for word in sys.argv[1:] if (CONF / word.partition("=")[0]).is_dir() and "," not in word]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("train", groups)
    parent = key.rpartition(".")[0]
    node = OmegaConf.select(composed, parent) if parent else composed
    if not isinstance(node, DictConfig):
        return [parent]
    return sorted(f"{parent}.{name!s}" if parent else str(name) for name in node)


if __name__ == "__main__":
    sys.exit(main())
