"""What the experiments share: models and controls, words and text, statistics, claims, reports."""

from experiments.lab.claims import Scores
from experiments.lab.lab import Lab, LabConfig, Subject
from experiments.lab.report import Report, run_experiment

__all__ = ["Lab", "LabConfig", "Report", "Scores", "Subject", "run_experiment"]
