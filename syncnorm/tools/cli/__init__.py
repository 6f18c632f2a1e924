"""The command line: ``syncnorm`` and its subcommands, one file each."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import click

from syncnorm import SyncNormError, __version__
from syncnorm.tools.cli.bench import bench
from syncnorm.tools.cli.compare import compare
from syncnorm.tools.cli.diagnose import diagnose
from syncnorm.tools.cli.env import env
from syncnorm.tools.cli.selftest import selftest
from syncnorm.tools.cli.signals import Ended, raised_as_exceptions
from syncnorm.tools.cli.study import study
from syncnorm.tools.common.launcher import print_error_once
from syncnorm.tools.report.consoles import console, tolerate_any_text


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="syncnorm")
def syncnorm() -> None:
    """Synchronized batch norm that runs wherever torch.distributed runs: is it right, and is it worth it?

    Exit codes: 0, done. 1, failed; what had been found by then is printed and written. 2, used wrongly. 3, done and
    printed, but a file could not be written.
    """


syncnorm.add_command(compare)
syncnorm.add_command(bench)
syncnorm.add_command(diagnose)
syncnorm.add_command(selftest)
syncnorm.add_command(env)
syncnorm.add_command(study)


def main() -> int:
    """Runs the command line and returns the exit code.

    0: done. 1: failed. 2: used wrongly, with one line on stderr. 3: a file was not written, likewise. 130:
    interrupted. 128 and the signal's number: ended by it. Under a launcher every rank returns the same code, but for
    3, which is rank 0's, and rank 0 alone prints.
    """
    tolerate_any_text(sys.stdout)  # for --help; what is printed on a console would see to it
    with raised_as_exceptions():
        return _exit_code()


def _exit_code() -> int:
    try:
        result = syncnorm.main(prog_name="syncnorm", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print_error_once(error.format_message())
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        print_error_once(f"{context.command_path if context else 'syncnorm'}: {_one_line(error.format_message())}")
        return 2
    except SyncNormError as error:
        print_error_once(f"syncnorm: {error}")
        return 1
    except OSError as error:
        # Most likely stdout: whoever read it has gone. What is left in its buffer would fail again at exit.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, lives as long as the process
        print_error_once(f"syncnorm: {error}")
        return 1
    except (click.Abort, KeyboardInterrupt):
        _say_the_end("interrupted")
        return 130
    except Ended as ended:
        with suppress(OSError):  # the terminal may be closed
            _say_the_end(f"ended by {ended.name}")
        return int(ended.code or 0)
    # Without standalone mode click returns the exit code of --help and --version, and a command's own result.
    return result if isinstance(result, int) else 0


def _say_the_end(how: str) -> None:
    # The rank that drew the progress bar was ended, and left the cursor hidden.
    console(stderr=True).show_cursor()
    print_error_once(f"syncnorm: {how}")


def _one_line(message: str) -> str:
    return " ".join(message.split())
