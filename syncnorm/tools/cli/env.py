"""``syncnorm env``."""

from __future__ import annotations

import json

import click

from syncnorm.tools.common.launcher import is_main_rank
from syncnorm.tools.env import environment
from syncnorm.tools.report.consoles import print_text


@click.command(short_help="What a bug report needs to say about this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(as_json: bool) -> None:
    """Print versions, hardware, backends and the environment variables that affect distributed training.

    Paste the output into a bug report. It contains no secrets, and not the path of your home directory. Under a
    launcher, rank 0 prints its own environment.
    """
    if is_main_rank():
        found = environment()
        print_text(json.dumps(found.to_dict(), indent=2) if as_json else str(found))
