"""The typer application, and what all commands share."""

from __future__ import annotations

import os
import sys
import warnings

import typer
from rich.console import Console
from rich.markup import escape

from stream_lens.cli.diff import diff_command
from stream_lens.cli.doctor import doctor_command
from stream_lens.cli.minimal_k import minimal_k_command
from stream_lens.cli.needle import needle_command
from stream_lens.cli.receivers import receivers_command
from stream_lens.cli.routes import routes_command
from stream_lens.cli.trace import trace_command

app = typer.Typer(
    name="stream-lens",
    help=(
        "Sparse attention patterns of long texts: which key blocks every query block of every head needs, in one "
        "forward pass, without T × T memory."
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("trace")(trace_command)
app.command("needle")(needle_command)
app.command("minimal-k")(minimal_k_command)
app.command("receivers")(receivers_command)
app.command("diff")(diff_command)
app.command("routes")(routes_command)
app.command("doctor")(doctor_command)


@app.callback()
def _main() -> None:
    # TransformerLens and transformers talk on import and on load; errors still come through.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def main() -> None:
    """Run the command line; errors that a user can mend are one red line and exit code 1."""
    # TransformerLens's dense bridge still names the KV cache as transformers did; nothing that a user can mend.
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
    try:
        app()
    except (ValueError, TypeError, RuntimeError, NotImplementedError, OSError) as error:
        if os.environ.get("STREAM_LENS_TRACEBACK"):
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
