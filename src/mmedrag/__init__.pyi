from .evaluation import evaluate as evaluate
from .pipeline import Pipeline as Pipeline, ask as ask, load_system as load_system
from .preference.pairs import build_pairs as build_pairs
from .records import Example as Example, Reference as Reference, Trace as Trace
from .retrieval import Index as Index

__version__: str
