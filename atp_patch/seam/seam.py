"""The seam: everything that lets a method drop visual tokens of a loaded model.

Hooks are bound methods of objects that the model carries, so copies and pickles of a patched model
are patched models of their own. What belongs to one forward pass travels with it or is kept for its
thread; what belongs to a conversation lives in its cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from atp_patch.seam.decoder_hooks import DecoderHooks
from atp_patch.seam.host import recorder
from atp_patch.seam.host.locate import Parts
from atp_patch.seam.host.recorder import Recorder
from atp_patch.seam.host.session import Session
from atp_patch.seam.model_hooks import ModelHooks
from atp_patch.seam.policy import Policy
from atp_patch.seam.thread_state import ThreadState
from atp_patch.seam.tower.reading import ReadingHooks
from atp_patch.seam.tower.videos import Videos


class Seam:
    """Everything that patching adds to one model; ``install`` and ``remove`` are exact inverses.

    Attributes:
        thread: what the running thread is doing with the model.
        recorder: the object that records the attention of the model's modules.
        vision: the hooks on the vision tower, or None.
        videos: the object that knows whether the tower reads videos.
        decoder: the hooks on the decoder.
    """

    def __init__(self, parts: Parts, policy: Policy) -> None:
        self.thread, self.recorder = ThreadState(), Recorder()
        self.vision = policy.vision_hooks(self._reads_images, self.recorder)
        self.videos = Videos(parts.base)
        reading_hooks = self.vision if isinstance(self.vision, ReadingHooks) else None
        self.decoder = DecoderHooks(parts, policy, self.thread, self.recorder, reading_hooks)
        self._model = ModelHooks(
            parts,
            self.thread,
            self.recorder,
            self.vision,
            leaves_tombstones=policy.leaves_tombstones,
        )
        self._handles: list[Any] = []

    def install(self) -> None:
        """Register the hooks."""
        recorder.register()
        add = self._handles.append
        self._model.install(add)
        self.decoder.install(add)
        if self.vision is not None:
            self.vision.install(add)
            self.videos.install()

    def remove(self) -> None:
        """Remove the hooks, and undo what ``install`` has changed besides them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._model.remove()
        self.decoder.remove()
        self.videos.remove()
        if self.vision is not None:
            self.vision.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register our attention function in the process that unpickles a patched model."""
        self.__dict__.update(state)
        recorder.register()

    @contextmanager
    def reading(self, prompt_ids: Tensor) -> Iterator[None]:
        """Let the model's ``get_image_features`` give what a pass over these prompts would get.

        Within this context the features are merged, with tombstones where tokens are dropped.

        Args:
            prompt_ids: (B, L) int64.
        """
        outer = self.thread.session
        self.thread.session = Session(prompt_ids.shape[1], ids=prompt_ids)
        try:
            yield
        finally:
            self.thread.session = outer

    def _reads_images(self) -> bool:
        return self.thread.reads_images
