"""The version, where every file can import it from."""

__version__ = "0.1.0"
