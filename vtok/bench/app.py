"""``vtok bench``: methods on one model, and the larger runs, ``kernels``, ``e2e`` and ``export``."""

from __future__ import annotations

import typer

from vtok.bench import table
from vtok.bench.e2e import command as e2e
from vtok.bench.export import command as export
from vtok.bench.kernels import command as kernels

app = typer.Typer(add_completion=False)
app.callback(invoke_without_command=True)(table.command)
app.command("kernels")(kernels.command)
app.command("e2e")(e2e.command)
app.command("export")(export)
