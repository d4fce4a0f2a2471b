"""The tokens of SmolLM2 that stand for an image.

They are special tokens that SmolLM2 has for source code and that chats do not use, so that no
embedding must be added. Rows of an image end in a line break.
"""

from __future__ import annotations

IMAGE_PAD, IMAGE_END, NEWLINE = "<file_sep>", "<issue_closed>", "\n"
