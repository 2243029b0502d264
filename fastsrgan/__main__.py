"""``python -m fastsrgan``, ``torchrun -m fastsrgan`` and the ``fastsrgan`` command.

Signals are looked after before the libraries are loaded, which takes seconds.
"""

from fastsrgan.interrupts import AtOnce


def main() -> int:
    """Run the command line; its exit code."""
    AtOnce().__enter__()  # to the end of the process, which takes its time too
    from fastsrgan import cli

    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
