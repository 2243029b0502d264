"""The documented path of ``report``, whose home is ``fastsrgan.report``."""
