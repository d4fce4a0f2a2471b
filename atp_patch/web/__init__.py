"""A web page on this computer: ask about a picture, plain and pruned, and see what is kept.

``python -m atp_patch.demo --web`` shows it; it needs gradio (``pip install "atp-patch[web]"``).
"""

from __future__ import annotations

from importlib.util import find_spec

from atp_patch.contract.errors import ConfigError
from atp_patch.visualize.canvas import require_matplotlib


def require_gradio() -> None:
    """Find out whether the page can be shown.

    Raises:
        ConfigError: if gradio or matplotlib is not installed.
    """
    require_matplotlib()
    if find_spec("gradio") is None:
        raise ConfigError(
            "--web needs gradio, which is not installed: pip install 'atp-patch[web]'."
        )
