"""Vector stores: nearest neighbours by inner product, behind :class:`~mmedrag.records.Store`."""

STORES = {"faiss": "mmedrag.retrieval.stores.faiss:FaissStore"}
