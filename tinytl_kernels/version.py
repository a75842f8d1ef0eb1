"""The version, in one place: ``setup.py`` reads it, ``tinytl_kernels.__version__`` is it."""

__version__ = "0.1.0"
