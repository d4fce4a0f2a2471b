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
        """What the package says about VoCo tokens; None for models without them.

        A model with VoCo tokens prunes at no layer.
        """

    def vision_hooks(self, active: Callable[[], bool], recorder: Recorder) -> VisionHooks | None:
        """Return the hooks on the vision tower, or None.

        Args:
            active: tells whether the running thread's call of the tower is part of a pass that may
                be pruned.
            recorder: records the tower's attention.
        """
