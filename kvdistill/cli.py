"""The command line: a table of commands, each imported when it is called.

So ``kvdistill --help`` imports neither torch nor transformers. Every ``KVDistillError``, and
every error of the operating system, becomes one line and an exit code here, and nowhere else.

Exit codes: 0 done, 1 user error, 2 wrong usage, 3 incomplete store, 75 interrupted (try again).
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import re
import signal
import sys
import traceback
from typing import Final

import click
from click.shell_completion import CompletionItem

from kvdistill import __version__
from kvdistill.errors import KVDistillError
from kvdistill.text import shorten

DISK_REMEDY: Final = "check the path, its permissions and free space, then run it again"

COMMANDS: Final = {
    "init": ("init", "Write a commented experiment file."),
    "config": ("prepare", "Show an experiment with its defaults, or the JSON schema."),
    "data": ("prepare", "Make corpora and tokenizers."),
    "fetch": ("prepare", "Download every model and data set of an experiment."),
    "doctor": ("prepare", "Check this machine, and what an experiment needs of it."),
    "plan": ("prepare", "Estimate disk space, time and lengths of an extraction."),
    "extract": ("extract", "Stage 1: read the corpus once with every teacher, into a store."),
    "status": ("cluster", "Show what of a store is done and what is missing."),
    "logs": ("cluster", "Show tracebacks and logs of failed shards."),
    "retry": ("cluster", "Retry quarantined shards."),
    "cancel": ("cluster", "Cancel the Slurm jobs of an experiment."),
    "dask": ("cluster", "Start Dask workers on Slurm, for inspect and verify."),
    "inspect": ("store", "Summarise a store: tables, plots, JSON."),
    "verify": ("store", "Check a store's files; --repair moves bad shards aside."),
    "convert": ("store", "Copy a store into the other backend."),
    "merge": ("store", "Merge shards of other stores over the same corpus."),
    "push": ("store", "Copy a store to a bucket."),
    "pull": ("store", "Copy a store from a bucket."),
    "rm": ("store", "Remove a teacher from a store."),
    "train": ("train", "Stage 2: distil the store into a student."),
    "run": ("train", "Extract, then train."),
    "ablate": ("ablate", "Train the arms of a study under several seeds, from one store."),
    "evaluate": ("train", "Perplexity, bits per character and exact match of a student."),
    "merge-students": ("report", "Average the weights of students of one checkpoint."),
    "export": ("report", "Export a student to ONNX, verified against torch."),
    "push-student": ("report", "Upload a run's student and its card to the hub."),
    "plot": ("report", "Draw the figures of a run's report as PNG."),
    "report": ("report", "Compare finished runs on one HTML page."),
}

QUIET: Final = {
    "transformers.modeling_utils": " LOAD REPORT",
    "transformers.modeling_layers": "Caching is incompatible with gradient checkpointing",
    "transformers.utils.generic": "`use_cache=True` is incompatible with gradient checkpointing",
    "transformers.tokenization_utils_base": "Token indices sequence length is longer|"
    "Please note that with a fast tokenizer",
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
    "transformers.generation.configuration_utils": "following generation flags are not valid",
}
"""By logger, messages (patterns) on what kvdistill checks or sets itself; nobody can act on them.

Weights that are missing or left over, for one, are an error of kvdistill's where they matter.
"""


class _LazyGroup(click.Group):
    """A click group that imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"kvdistill.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names and summaries from the table, for which click would import every command."""
        options = click.Command.shell_complete(self, ctx, incomplete)
        names = [name for name in COMMANDS if name.startswith(incomplete)]
        return [*(CompletionItem(name, help=COMMANDS[name][1]) for name in names), *options]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvdistill")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Distil several teachers into one student through their key/value caches.

    Start with `kvdistill init experiment.yaml`, then `kvdistill run experiment.yaml`.
    """
    ctx.ensure_object(dict)["debug"] = debug


def _is_other(pattern: str, record: logging.LogRecord) -> bool:
    return re.search(pattern, record.getMessage()) is None


def quieten() -> None:
    """Filter the messages of ``QUIET``; all others pass."""
    for name, pattern in QUIET.items():
        logging.getLogger(name).addFilter(functools.partial(_is_other, pattern))


def main() -> None:
    """Entry point of the console script."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.default_int_handler)  # also while a command is imported
    if "--debug" not in sys.argv:
        quieten()
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(75)
    except BrokenPipeError:
        # The reader of a pipe has closed it (`kvdistill config schema | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (KVDistillError, OSError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        remedy = "" if isinstance(error, KVDistillError) else f"; {DISK_REMEDY}"
        print(f"error: {shorten(f'{error}{remedy}', 500)}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main()
