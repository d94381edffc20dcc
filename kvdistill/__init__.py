"""kvdistill: distil several teachers into one student through their key/value caches."""

__version__ = "0.1.0"
