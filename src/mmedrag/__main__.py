"""``python -m mmedrag``: the same as the ``mmedrag`` script."""

from mmedrag.cli.main import main

main()
