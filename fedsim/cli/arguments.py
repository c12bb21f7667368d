"""Arguments that several commands share.

Arguments are explained in the help text of their command, and hidden from the list that typer 0.20 makes of them:
with click 8.5 that list has lost its texts.
"""

import typer

CONFIG = typer.Argument(metavar="CONFIG", hidden=True)
CHANGES = typer.Argument(None, metavar="[KEY.PATH=VALUE]...", hidden=True)
RUN = typer.Argument(metavar="RUN", hidden=True)
