"""Vector stores: nearest neighbours by inner product, behind :class:`~mmedrag.protocols.Store`."""

STORES = {"faiss": "mmedrag.stores.faiss:FaissStore"}
