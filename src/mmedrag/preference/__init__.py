"""RAG-PT (paper §3.3): ``pairs`` makes preference pairs, ``dpo`` tunes an adapter on them."""
