"""``python -m fastsrgan``, ``torchrun -m fastsrgan`` and the ``fastsrgan`` command.

Signals are looked after before the libraries are loaded, which takes seconds. So are standard streams that are closed,
and a current folder that is gone, without which they cannot be loaded.
"""

import gc
import os
import sys

from fastsrgan.core.signals import AtOnce, no_room, open_streams
from fastsrgan.errors import out_of_memory


def main() -> int:
    """Run the command line; its exit code."""
    AtOnce().__enter__()  # to the end of the process, which takes its time too
    open_streams()
    try:
        os.getcwd()
    except OSError:
        sys.stderr.write("error: the current folder: does not exist any more (cd to another one)\n")
        return 5
    try:
        from fastsrgan.cli import main as cli
    except Exception as error:
        if not out_of_memory(error):
            raise
        sys.stderr.write(f"error: {no_room()}\n")
        return 5
    code = cli.main()
    # Python looks through all objects of all libraries for what is no longer used, several times, before it ends: on a
    # machine with other work that took a stopped command longer than anything it had left to do.
    gc.freeze()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
