"""Silences what the libraries print about themselves on every rank; errors still come through."""

import logging
import os
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
warnings.filterwarnings("ignore", category=FutureWarning)  # torch 2.13, at every collective of DeepSpeed 0.19
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
logging.getLogger("torch.distributed").setLevel(logging.ERROR)
