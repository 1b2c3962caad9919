from .evaluation import evaluate as evaluate
from .pipeline import Pipeline as Pipeline
from .pipeline import ask as ask
from .pipeline import load_system as load_system
from .preference.pairs import build_pairs as build_pairs
from .records import Example as Example
from .records import Reference as Reference
from .records import Trace as Trace
from .retrieval import Index as Index

__version__: str
