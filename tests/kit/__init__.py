"""What the tests share: real sockets, real processes, no mocks.

    common      waiting, and what is installed
    server      chatstream.py as a process of its own
    clock       its time, which a test turns
    vitals      what that process holds; that an attack harmed nobody else
    client      HTTP/1.1, byte for byte
    websocket   frames, which may break the protocol
    http2       a client that may break that one
    room        members of the room
    answers     questions, and what their answers say
    attacks     all that clients do wrong
    upstream    a model's server that follows a script
    protocols   what four protocols say, in several manners
    sdks        the SDKs for Python and Node
    proxy       connections that break or stall
    site        pages of another origin
    browser     Chromium
    checker     check_stream.py, as its users run it
    network     machines whose packets can get lost
    pages       the pages, as their users open them
    npm         packages for a browser and for Node
    redis       a real redis-server

Servers of the kit run in a thread each: a browser or a blocking SDK can use them, too.
"""

from .pages import *  # isort: skip (its own ask and over are for the pages' tests)
from .answers import *
from .attacks import *
from .background import *
from .browser import *
from .checker import *
from .client import *
from .clock import *
from .common import *
from .http2 import *
from .network import *
from .npm import *
from .protocols import *
from .proxy import *
from .redis import *
from .room import *
from .sdks import *
from .server import *
from .site import *
from .upstream import *
from .vitals import *
from .websocket import *
