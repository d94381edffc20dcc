"""The command line: a table of commands, each imported when it is called.

So ``kvdistill --help`` imports neither torch nor transformers. Every ``KVDistillError`` becomes
one line and an exit code here, and nowhere else.

Exit codes: 0 done, 1 user error, 2 wrong usage, 3 incomplete store, 75 interrupted (try again).
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Final

import click

from kvdistill import __version__
from kvdistill.errors import KVDistillError

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "init": ("prepare:init_command", "Write a commented experiment file."),
    "config": (
        "prepare:config_command",
        "Show an experiment with its defaults, or the JSON schema.",
    ),
    "data": ("prepare:data_command", "Make corpora and tokenizers."),
    "fetch": ("prepare:fetch_command", "Download every model and data set of an experiment."),
    "plan": ("prepare:plan_command", "Estimate disk space, time and lengths of an extraction."),
    "extract": (
        "extract:extract_command",
        "Stage 1: read the corpus once with every teacher, into a store.",
    ),
    "status": ("cluster:status_command", "Show what of a store is done and what is missing."),
    "logs": ("cluster:logs_command", "Show tracebacks and logs of failed shards."),
    "retry": ("cluster:retry_command", "Retry quarantined shards."),
    "cancel": ("cluster:cancel_command", "Cancel the Slurm jobs of an experiment."),
    "dask": ("cluster:dask_command", "Start Dask workers on Slurm, for inspect and verify."),
    "inspect": ("store:inspect_command", "Summarise a store: tables, plots, JSON."),
    "verify": ("store:verify_command", "Check a store's files; --repair moves bad shards aside."),
    "convert": ("store:convert_command", "Copy a store into the other backend."),
    "merge": ("store:merge_command", "Merge shards of other stores over the same corpus."),
    "rm": ("store:rm_command", "Remove a teacher from a store."),
    "train": ("train:train_command", "Stage 2: distil the store into a student."),
    "run": ("train:run_command", "Extract, then train."),
    "ablate": (
        "ablate:ablate_command",
        "Train the arms of a study under several seeds, from one store.",
    ),
    "evaluate": (
        "train:evaluate_command",
        "Perplexity, bits per character and exact match of a student.",
    ),
    "export": ("report:export_command", "Export a student to ONNX, verified against torch."),
    "plot": ("report:plot_command", "Plot a run: layer map, alignment, errors, weights, spectra."),
    "report": ("report:report_command", "Compare finished runs on one HTML page."),
}


class _LazyGroup(click.Group):
    """A click group that imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module_name, attribute = COMMANDS[cmd_name][0].split(":")
        module = importlib.import_module(f"kvdistill.commands.{module_name}")
        command: click.Command = getattr(module, attribute)
        return command

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


def main() -> None:
    """Entry point of the console script."""
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
    except KVDistillError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe has closed it (`kvdistill config schema | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
