from .build import build_pairs as build_pairs
from .build import make_pairs as make_pairs
from .even import even_answers as even_answers
from .export import export_pairs as export_pairs
from .files import read_pairs as read_pairs
from .files import write_pairs as write_pairs
from .settings import PairSettings as PairSettings
