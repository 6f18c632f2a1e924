"""``python -m syncnorm`` and the ``syncnorm`` script."""

import sys

from syncnorm.tools.common.launcher import is_main_rank

# Import name -> the extra that brings it.
_EXTRAS = dict.fromkeys(("accelerate", "click", "rich", "sklearn", "matplotlib", "jinja2", "mlxtend"), "compare")


def main() -> int:
    """Runs the command line; says in one line which extra is missing where one is."""
    try:
        from syncnorm.tools.cli import main as cli_main

        return cli_main()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        if is_main_rank():
            extra = _EXTRAS[missing]
            print(f'syncnorm: needs {missing}: pip install "syncnorm[{extra}]"', file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while torch is being imported; later ones are cli's
        return 130


if __name__ == "__main__":
    sys.exit(main())
