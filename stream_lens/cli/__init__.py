"""The command line: `stream-lens COMMAND`. Every command is a thin layer over one function of the library."""

from stream_lens.cli.app import app

__all__ = ["app"]
