"""Who sees whom with VoCo tokens, against matrices that are written out."""

from __future__ import annotations

import torch

from atp_patch.maths import insert_voco_tokens, output_columns, voco_visible

# text, image of three, two VoCo tokens, text, image of two, two VoCo tokens, text
SEQUENCE = "t i i i v v t j j w w t"
SEES = """
1 . . . . . . . . . . .
1 1 . . . . . . . . . .
1 1 1 . . . . . . . . .
1 1 1 1 . . . . . . . .
1 1 1 1 1 . . . . . . .
1 1 1 1 1 1 . . . . . .
1 . . . 1 1 1 . . . . .
1 . . . 1 1 1 1 . . . .
1 . . . 1 1 1 1 1 . . .
1 . . . 1 1 1 1 1 1 . .
1 . . . 1 1 1 1 1 1 1 .
1 . . . 1 1 1 . . 1 1 1
"""


def matrix(text: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in row.split()] for row in text.strip().splitlines()])


def test_who_sees_whom() -> None:
    sequence = insert_voco_tokens([[(1, 4), (5, 7)]], length=8, num_tokens=2)
    assert sequence.place[0].tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 6, 5, 6, 7]
    assert sequence.voco[0].tolist() == [-1, -1, -1, -1, 0, 1, -1, -1, -1, 0, 1, -1]
    letters = [
        "tij"[s + 1] if v < 0 else "vw"[s]
        for s, v in zip(sequence.segment[0].tolist(), sequence.voco[0].tolist(), strict=True)
    ]
    assert letters == SEQUENCE.split()
    visible = voco_visible(sequence, sequence.valid)
    assert torch.equal(visible[0], matrix(SEES))


def test_padding_is_seen_by_itself_alone() -> None:
    sequence = insert_voco_tokens([[(2, 4)]], length=5, num_tokens=1)
    attended = torch.tensor([[False, True, True, True, True, True]])
    expected = matrix("""
    1 . . . . .
    . 1 . . . .
    . 1 1 . . .
    . 1 1 1 . .
    . 1 1 1 1 .
    . 1 . . 1 1
    """)
    assert torch.equal(voco_visible(sequence, attended)[0], expected)


def test_shorter_samples_are_filled_up_behind() -> None:
    sequence = insert_voco_tokens([[(0, 2), (3, 5)], []], length=5, num_tokens=1)
    assert sequence.valid.tolist() == [[True] * 7, [True] * 5 + [False] * 2]
    assert sequence.place[1].tolist() == [0, 1, 2, 3, 4, 0, 0]
    visible = voco_visible(sequence, sequence.valid)
    assert torch.equal(visible[1, :5, :5], torch.ones(5, 5, dtype=torch.bool).tril())
    assert not visible[1, :5, 5:].any()


def test_voco_tokens_answer_at_the_last_visual_places() -> None:
    sequence = insert_voco_tokens([[(1, 4)], []], length=5, num_tokens=2)
    assert output_columns(sequence, 5).tolist() == [[0, 1, 4, 5, 6], [0, 1, 2, 3, 4]]
