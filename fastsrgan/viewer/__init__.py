"""Self-contained HTML pages about results and runs, and the figure of ``fastsrgan.show``."""
