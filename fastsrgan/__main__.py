"""``python -m fastsrgan``, ``torchrun -m fastsrgan`` and the ``fastsrgan`` command.

Signals are looked after before the libraries are loaded, which takes seconds. So is a current folder that is gone,
without which they cannot be loaded.
"""

import os
import sys

from fastsrgan.interrupts import AtOnce


def main() -> int:
    """Run the command line; its exit code."""
    AtOnce().__enter__()  # to the end of the process, which takes its time too
    try:
        os.getcwd()
    except OSError:
        sys.stderr.write("error: the current folder: does not exist any more (cd to another one)\n")
        return 5
    from fastsrgan import cli

    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
