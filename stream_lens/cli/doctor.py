"""`stream-lens doctor`: which kernels can run on this machine, and why the others cannot."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def doctor_command() -> None:
    """Say which kernels are live here, for attention and for the search, and why the others are not."""
    from stream_lens.doctor import doctor

    table = Table(title="Kernels on this machine, fastest first", title_justify="left")
    for name in ("work", "path", "serves", "live", "detail"):
        table.add_column(name, overflow="fold")
    for row in doctor():
        table.add_row(row.work, row.path, row.tensors, "[green]yes[/]" if row.live else "[red]no[/]", row.detail)
    Console().print(table)
