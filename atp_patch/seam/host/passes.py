"""What belongs to the forward pass that a thread is in.

Any number of threads may call one patched model. What has to be known from one hook to the next is
therefore not kept on modules, hooks or configs, but in objects that hold a value for each thread.
"""

from __future__ import annotations

import threading
from typing import Any


class PerThread(threading.local):
    """Base class of objects whose attributes each thread has for itself.

    ``__init__`` runs again in each thread that uses the object. A copy or a pickle takes no
    thread's values with it and begins with fresh ones.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
