from . import check as check
from . import clip as clip
from . import preference as preference
from . import stages as stages
from . import vision as vision
from . import vlm as vlm
