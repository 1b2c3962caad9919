"""mmedrag: retrieval-augmented generation for medical vision-language models.

Importing this package imports nothing heavy: no torch, no network, no logging set-up.
"""

__version__ = "0.1.0"
