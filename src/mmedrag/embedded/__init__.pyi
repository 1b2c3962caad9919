from .folder import (
    BENCHMARK as BENCHMARK,
    EMBEDDED as EMBEDDED,
    REAL as REAL,
    available as available,
    foreign as foreign,
    located as located,
    path as path,
    retriever_of as retriever_of,
)
