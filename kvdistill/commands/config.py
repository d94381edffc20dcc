"""``kvdistill init`` and ``kvdistill config``."""

from __future__ import annotations

import json
from pathlib import Path

import click

import kvdistill.config
from kvdistill.commands.options import config_argument, overrides_option
from kvdistill.errors import ConfigError


@click.command("init")
@click.argument("path", type=click.Path(path_type=Path), default=Path("experiment.yaml"))
def init_command(path: Path) -> None:
    """Write a commented experiment file to PATH (default: experiment.yaml)."""
    if path.exists():
        raise ConfigError(f"{path} is already there; give another name, or remove it first")
    template = (
        Path(kvdistill.config.__file__).with_name("experiment.yaml").read_text(encoding="utf-8")
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template, encoding="utf-8")
    click.echo(f"wrote {path}\nnext: edit it, then `kvdistill run {path}`")


@click.group("config")
def config_command() -> None:
    """Show an experiment with its defaults, or the schema."""


@config_command.command()
@config_argument
@overrides_option
def show(config: Path, overrides: tuple[str, ...]) -> None:
    """Check CONFIG and print it whole, with every default."""
    from kvdistill.config.load import dump_experiment, load_experiment

    click.echo(
        dump_experiment(load_experiment(config, overrides)),
        nl=False,
    )


@config_command.command()
def schema() -> None:
    """Print the JSON schema of an experiment file, for editors."""
    from kvdistill.config.experiment import Experiment

    click.echo(json.dumps(Experiment.model_json_schema(), indent=2))
