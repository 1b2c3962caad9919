from .folder import (
    EMBEDDED as EMBEDDED,
    available as available,
    located as located,
    path as path,
    retriever_of as retriever_of,
)
