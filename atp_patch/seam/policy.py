"""What the seam asks of the rest of the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from atp_patch.seam.door.entry import PrefillPolicy
from atp_patch.seam.host.recorder import Recorder
from atp_patch.seam.tower.merging import VisionHooks
from atp_patch.seam.voco.voco_pass import VoCoPolicy


class Policy(PrefillPolicy, Protocol):
    """What the seam asks of the rest of the package."""

    @property
    def voco(self) -> VoCoPolicy | None:
        """What is said about VoCo tokens, where the model has them; it then prunes no layer."""

    def vision_hooks(self, active: Callable[[], bool], recorder: Recorder) -> VisionHooks | None:
        """What hooks into the vision tower, or None.

        Args:
            active: whether the running thread's call of the tower is part of a pass that may be
                pruned.
        """
