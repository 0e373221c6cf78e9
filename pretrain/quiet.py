"""Silences messages of the libraries that every rank would print. Errors still appear. Import it first."""

import logging
import os
import warnings

import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it looked for others
warnings.filterwarnings("ignore", category=FutureWarning)  # torch 2.13, at every collective of DeepSpeed 0.19
logging.getLogger("torch.distributed").setLevel(logging.ERROR)
logging.getLogger("DeepSpeed").addFilter(lambda record: "OVERFLOW" not in record.getMessage())  # the guard reports it
