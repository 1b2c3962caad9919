"""RAG-PT (paper §3.3): ``pairs`` makes preference pairs of traces, ``dpo`` tunes an adapter on
them.
"""
