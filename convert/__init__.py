"""What a checkpoint file means: recognise it, read it safely, write it for other tools."""

__version__ = "0.1.0"
