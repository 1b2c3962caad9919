from .folder import (
    EMBEDDED as EMBEDDED,
    available as available,
    cache_folder as cache_folder,
    located as located,
    path as path,
)
