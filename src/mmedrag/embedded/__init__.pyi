from .folder import EMBEDDED as EMBEDDED
from .folder import available as available
from .folder import cache_folder as cache_folder
from .folder import located as located
from .folder import path as path
from .folder import retriever_of as retriever_of
