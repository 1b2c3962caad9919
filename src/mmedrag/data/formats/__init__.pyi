from . import released as released
from .released_pairs import import_released as import_released
from .trainer_pairs import import_pairs as import_pairs
