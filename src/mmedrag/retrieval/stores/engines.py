"""Names of the vector stores that implement :class:`mmedrag.records.Store`."""

STORES = {"faiss": "mmedrag.retrieval.stores.faiss:FaissStore"}
