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
from syncnorm.tools.cli.report import report
from syncnorm.tools.cli.selftest import selftest
from syncnorm.tools.cli.signals import SignalExit, signals_as_exceptions
from syncnorm.tools.cli.study import study
from syncnorm.tools.common.errors import missing_extra
from syncnorm.tools.common.launcher import is_main_rank, print_error_once
from syncnorm.tools.report.consoles import console, replace_unencodable

FIRST_STEPS = """\
Start here:

  syncnorm selftest              is the layer correct on this machine?
  syncnorm compare               does a small model need it, and at what cost?
  syncnorm compare --model my_module:build --data my_module:datasets
                                 the same for your model and your data
  syncnorm diagnose              which layers and which ranks wait, or differ?

In your code, before DistributedDataParallel: model = syncnorm.convert(model)
"""
COMPLETION = """\
Completion, in bash, zsh and fish:

\b
eval "$(_SYNCNORM_COMPLETE=bash_source syncnorm)"
eval "$(_SYNCNORM_COMPLETE=zsh_source syncnorm)"
_SYNCNORM_COMPLETE=fish_source syncnorm | source
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True, epilog=COMPLETION)
@click.version_option(__version__, prog_name="syncnorm")
@click.pass_context
def syncnorm(context: click.Context) -> None:
    """Tools for synchronized batch norm: is it correct, and is it worth its cost?

    Exit codes: 0, success. 1, failure; results found until then have been printed and written. 2, wrong usage. 3,
    the result was printed, but a file could not be written.
    """
    if context.invoked_subcommand is None and is_main_rank():
        click.echo(f"{FIRST_STEPS}\n{context.get_help()}")


syncnorm.add_command(compare)
syncnorm.add_command(report)
syncnorm.add_command(bench)
syncnorm.add_command(diagnose)
syncnorm.add_command(selftest)
syncnorm.add_command(env)
syncnorm.add_command(study)


def main() -> int:
    """Runs the command line and returns the exit code.

    0: success. 1: failure. 2: wrong usage, or a package is missing; one line on stderr says which. 3: a file was not
    written, likewise. 130: interrupted. 128 plus its number: ended by a signal. Under a launcher, all ranks return
    the same code, except 3, which only rank 0 returns; only rank 0 prints.
    """
    replace_unencodable(sys.stdout)  # for --help, which click prints; our consoles do it themselves
    with signals_as_exceptions():
        return _exit_code()


def _exit_code() -> int:
    try:
        result = syncnorm.main(prog_name="syncnorm", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print_error_once(error.format_message())
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        message = " ".join(error.format_message().split())
        print_error_once(f"{context.command_path if context else 'syncnorm'}: {message}")
        return 2
    except SyncNormError as error:
        hint = missing_extra(error)  # a started rank may be the first to import a package
        print_error_once(f"syncnorm: {hint or error}")
        return 2 if hint else 1
    except OSError as error:
        # Most likely the reader of stdout has exited. Python would fail again at exit to write what is in its buffer.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, lives as long as the process
        print_error_once(f"syncnorm: {error}")
        return 1
    except (click.Abort, KeyboardInterrupt):
        _print_end("interrupted")
        return 130
    except SignalExit as end:
        with suppress(OSError):  # the terminal may be closed
            _print_end(f"ended by {end.name}")
        return int(end.code or 0)
    # Without standalone mode, click returns the exit code of --help and --version, and the result of a command.
    return result if isinstance(result, int) else 0


def _print_end(how: str) -> None:
    # The rank that drew the progress bar has been ended and has left the cursor hidden.
    console(stderr=True).show_cursor()
    print_error_once(f"syncnorm: {how}")
