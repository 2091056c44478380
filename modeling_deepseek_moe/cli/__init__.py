"""The command line ``deepseek-moe``: one file per command, put together in `app`."""

from modeling_deepseek_moe.cli.app import app, main

__all__ = ["app", "main"]
