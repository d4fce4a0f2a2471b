"""The frames of videos that stand in chats as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers.video_utils import VideoMetadata, load_video

Chat = Sequence[Mapping[str, Any]]


def with_frames(
    chats: Sequence[Chat], num_frames: int | None = None, fps: float | None = None
) -> tuple[list[Chat], list[VideoMetadata]]:
    """The chats with frames in the place of video files, and what is known of these videos.

    PyAV decodes the files.

    Args:
        chats: the chats.
        num_frames: how many frames of each video are seen, evenly; all of one that has fewer.
        fps: how many frames of each second are seen, instead.
    """
    found: list[VideoMetadata] = []

    def indices(metadata: VideoMetadata, **_: Any) -> Any:
        total = metadata.total_num_frames
        wanted = total * fps / (metadata.fps or fps) if fps else num_frames or total
        return np.linspace(0, total - 1, min(max(round(wanted), 1), total)).round().astype(int)

    def part(given: Mapping[str, Any]) -> Mapping[str, Any]:
        if given["type"] != "video" or not isinstance(given["video"], str):
            return given
        frames, metadata = load_video(given["video"], backend="pyav", sample_indices_fn=indices)
        found.append(metadata)
        return {**given, "video": frames}

    def message(given: Mapping[str, Any]) -> Mapping[str, Any]:
        if isinstance(given["content"], str):
            return given
        return {**given, "content": [part(one) for one in given["content"]]}

    return [[message(given) for given in chat] for chat in chats], found
