"""What every part stands on: files, memory, progress, signals, threads, ranks and kernels."""
