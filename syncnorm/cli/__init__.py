"""The command line: ``syncnorm`` and its subcommands, one file each."""

from __future__ import annotations

import os
import sys

import click
from rich.console import Console

from syncnorm import SyncNormError, __version__
from syncnorm.cli.bench import bench
from syncnorm.cli.compare import compare
from syncnorm.cli.diagnose import diagnose
from syncnorm.cli.env import env
from syncnorm.cli.selftest import selftest
from syncnorm.cli.study import study
from syncnorm.launcher import say_once


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="syncnorm")
def syncnorm() -> None:
    """Synchronized batch norm that runs wherever torch.distributed runs: is it right, and is it worth it?"""


syncnorm.add_command(compare)
syncnorm.add_command(bench)
syncnorm.add_command(diagnose)
syncnorm.add_command(selftest)
syncnorm.add_command(env)
syncnorm.add_command(study)


def main() -> int:
    """Runs the command line and returns the exit code.

    0: done. 1: failed. 2: used wrongly, with one line on stderr. 130: interrupted. Under a launcher every
    rank returns the same code, and rank 0 alone prints.
    """
    try:
        result = syncnorm.main(prog_name="syncnorm", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        say_once(error.format_message())
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        say_once(f"{context.command_path if context else 'syncnorm'}: {_one_line(error.format_message())}")
        return 2
    except SyncNormError as error:
        say_once(f"syncnorm: {error}")
        return 1
    except OSError as error:
        # Most likely stdout: whoever read it has gone. What is left in its buffer would fail again at exit.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, lives as long as the process
        say_once(f"syncnorm: {error}")
        return 1
    except (click.Abort, KeyboardInterrupt):
        # The rank that drew the progress bar was ended, and left the cursor hidden.
        Console(stderr=True).show_cursor()
        say_once("syncnorm: interrupted")
        return 130
    # Without standalone mode click returns the exit code of --help and --version, and a command's own result.
    return result if isinstance(result, int) else 0


def _one_line(message: str) -> str:
    return " ".join(message.split())
