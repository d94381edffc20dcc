"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

config_argument: Decorator = click.argument("config", type=click.Path(path_type=Path))

overrides_option: Decorator = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one setting, such as training.epochs=2; repeat for more.",
)

json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON for a script instead of text."
)
