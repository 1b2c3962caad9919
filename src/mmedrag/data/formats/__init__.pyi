from . import released as released
from .trainer_pairs import import_pairs as import_pairs
