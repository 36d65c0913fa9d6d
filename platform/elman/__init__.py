"""elman: an experiment platform for recurrent language models."""

__version__ = "0.1.0"
