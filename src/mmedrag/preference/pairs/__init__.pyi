from .build import build_pairs as build_pairs, make_pairs as make_pairs
from .construct import construct_pairs as construct_pairs
from .files import (
    export_pairs as export_pairs,
    read_pairs as read_pairs,
    sources_of as sources_of,
    write_pairs as write_pairs,
)
from .sampling import even_answers as even_answers
from .settings import PairSettings as PairSettings
