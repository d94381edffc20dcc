"""The command line: a table of commands, each loaded when it is called.

Loading lazily keeps ``kvdistill --help`` free of torch and transformers. Every error that
kvdistill raises on purpose becomes one line and an exit code here, and nowhere else.

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
    "init": ("config:init_command", "Write a commented experiment file."),
    "config": ("config:config_command", "Show an experiment with its defaults, or the schema."),
    "data": ("data:data", "Make corpora and tokenizers."),
    "fetch": ("plan:fetch_command", "Download every model and data set ahead of time."),
    "plan": ("plan:plan_command", "Say what extraction will cost: disk, hours, lengths."),
    "extract": ("extract:extract_command", "Stage 1: read every teacher once into the store."),
    "status": ("cluster:status_command", "Say what of a store is done and what is missing."),
    "logs": ("cluster:logs_command", "Show tracebacks and logs of shards that failed."),
    "retry": ("cluster:retry_command", "Let quarantined shards be tried again."),
    "cancel": ("cluster:cancel_command", "Cancel a run's Slurm jobs."),
    "dask": ("cluster:dask_command", "Start Dask workers on Slurm, for inspect and verify."),
    "inspect": ("store:inspect_command", "Look into a store: tables, plots, JSON."),
    "verify": (
        "store:verify_command",
        "Check every file of a store; --repair moves bad shards aside.",
    ),
    "convert": ("store:convert_command", "Copy a store into the other backend."),
    "merge": ("store:merge_command", "Bring shards of other stores over the same corpus together."),
    "rm": ("store:rm_command", "Remove a teacher from a store."),
    "train": ("train:train_command", "Stage 2: distil the store into a student."),
    "run": ("train:run_command", "Extract, then train."),
    "ablate": ("ablate:ablate_command", "Arms times seeds from one store, compared fairly."),
    "evaluate": ("train:evaluate_command", "Perplexity and bits per character of a student."),
    "export": ("report:export_command", "Write a student as ONNX, checked against torch."),
    "plot": ("report:plot_command", "Draw a run: layer map, alignment, errors, weights, spectra."),
    "report": ("report:report_command", "One page with curves and figures from finished runs."),
}


class _LazyGroup(click.Group):
    """A click group whose commands are imported when first needed."""

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
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
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
        # The reader of a pipe left (`kvdistill config schema | head`); that is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
