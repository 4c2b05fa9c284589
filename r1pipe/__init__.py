"""r1pipe: the whole DeepSeek-R1 recipe as one resumable, traceable pipeline."""

__version__ = "0.1.0"
