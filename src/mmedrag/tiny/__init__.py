"""How the embedded small models are made: ``python -m mmedrag.tiny``, from the benchmark alone."""
