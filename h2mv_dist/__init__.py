"""Distributed training and global inference of hybrid (physics + LSTM) land models."""

from typing import Final

__version__: Final = "0.1.0"
