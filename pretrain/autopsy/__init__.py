"""Autopsies of bad steps: the last steps in figures, and the batch that was read."""

from pretrain.autopsy.autopsies import Autopsies
from pretrain.autopsy.recorder import Recorder

__all__ = ["Autopsies", "Recorder"]
