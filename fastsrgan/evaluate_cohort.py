"""The documented path of the scores of cohorts, whose home is ``fastsrgan.evaluate.cohort``."""

from fastsrgan.evaluate.cohort import evaluate_folders, evaluate_table

__all__ = ["evaluate_folders", "evaluate_table"]
