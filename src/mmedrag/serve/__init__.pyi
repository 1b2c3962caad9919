from . import openai as openai, page as page, uploads as uploads
from .app import create_app as create_app
from .audit import Audit as Audit, verify as verify
from .security import load_keys as load_keys, may_bind as may_bind, new_key as new_key
from .server import may_listen as may_listen, serve as serve
from .settings import ServeSettings as ServeSettings
from .versions import describe as describe, weights as weights
