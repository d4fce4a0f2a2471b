"""Which frames of a video a chat is given."""

from __future__ import annotations

import numpy as np
import pytest
from transformers.video_utils import VideoMetadata

from atp_patch.integrations import videos

FILM = np.arange(6)[:, None, None, None] * np.ones((1, 2, 2, 3))  # six frames in three seconds


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"num_frames": 4}, [0, 2, 3, 5]),
        ({"num_frames": 1}, [0]),
        ({"num_frames": 9}, [0, 1, 2, 3, 4, 5]),
        ({"fps": 1}, [0, 2, 5]),
        ({"fps": 30}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_frames_are_even_and_no_more_than_there_are(monkeypatch, asked, expected):
    def load(path, backend, sample_indices_fn):
        metadata = VideoMetadata(total_num_frames=len(FILM), fps=2.0)
        metadata.frames_indices = sample_indices_fn(metadata=metadata)
        return FILM[metadata.frames_indices], metadata

    monkeypatch.setattr(videos, "load_video", load)
    image, text = {"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, {"type": "video", "video": "a.mp4"}, text]},
    ]
    ((system, user),), (metadata,) = videos.with_frames([chat], **asked)
    assert system == chat[0]
    assert [user["content"][0], user["content"][2]] == [image, text]
    assert user["content"][1]["video"][:, 0, 0, 0].tolist() == expected
    assert list(metadata.frames_indices) == expected
    assert chat[1]["content"][1]["video"] == "a.mp4"


def test_frames_that_are_given_stay():
    chat = [{"role": "user", "content": [{"type": "video", "video": FILM}]}]
    ((user,),), found = videos.with_frames([chat], num_frames=2)
    assert user["content"][0]["video"] is FILM
    assert found == []
