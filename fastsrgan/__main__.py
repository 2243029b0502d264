"""``python -m fastsrgan`` and ``torchrun -m fastsrgan``: the same as the ``fastsrgan`` command."""

from fastsrgan.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
