"""``syncnorm env``."""

from __future__ import annotations

import json

import click

from syncnorm.tools.common.launcher import is_main_rank
from syncnorm.tools.env import environment
from syncnorm.tools.report.consoles import say
from syncnorm.tools.report.env_text import env_text


@click.command(short_help="What a report of a bug needs to say about this machine.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def env(as_json: bool) -> None:
    """Print versions, machine, backends and the variables that bear on distributed training, to paste in a report.

    Nothing secret is in there, and no path of your home directory. Under a launcher rank 0 prints what it sees.
    """
    if is_main_rank():
        found = environment()
        say(json.dumps(found.to_dict(), indent=2) if as_json else env_text(found))
