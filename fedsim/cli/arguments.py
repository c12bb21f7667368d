"""Arguments that several commands share."""

import typer

CONFIG = typer.Argument(metavar="CONFIG", help="YAML file of the federation.")
CHANGES = typer.Argument(None, metavar="[KEY.PATH=VALUE]...", help="Values to replace in it.", show_default=False)
