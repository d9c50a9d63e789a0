"""The picture of a decision next to its frame."""

import numpy as np
import pytest

from lore_llm import panel
from lore_llm.panel import decision_panel

FRAME = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
WIDTH = 360


def _info(count=3, **changes):
    info = {
        "caption": "You see: tree near left",
        "actions": [f"action_{index}" for index in range(count)],
        "actor": [1 / count] * count,
        "adviser": [1.0] + [0.0] * (count - 1),
        "mix": [0.5] + [0.5 / max(count - 1, 1)] * (count - 1),
        "beta": 0.25,
        "choice": "action_0",
        "option": None,
        "value": 1.5,
        "predicted_return": 2.5,
    }
    return info | changes


def _draw(frame=FRAME, width=WIDTH, **changes):
    return decision_panel(frame, _info(**changes), width)


def _length(picture, who):
    """Pixels of each row of one colour among the bars, from top to bottom."""
    bars = picture[panel.MARGIN + (panel.CAPTION_LINES + 4) * panel.LINE :, FRAME.shape[1] * 6 :]
    rows = (bars == panel.COLORS[who]).all(-1).sum(1)
    return [int(row) for row in rows if row]


def test_frame_is_enlarged_by_a_whole_factor_on_the_left():
    picture = _draw()
    assert picture.dtype == np.uint8 and picture.shape[1] == 6 * 64 + WIDTH
    assert (picture[:384:6, :384:6] == FRAME).all() and (picture[5:384:6, 5:384:6] == FRAME).all()


@pytest.mark.parametrize("count", [1, 17, 200])
def test_size_does_not_depend_on_the_texts(count):
    sizes = {
        _draw(count=count, **changes).shape
        for changes in (
            {},
            {"caption": ""},
            {"caption": "word " * 500 + "\n" * 50},
            {"caption": "x" * 2000, "option": "skill " * 50, "choice": "y" * 300},
            {"adviser": None, "value": float("nan"), "predicted_return": -1e30},
        )
    }
    assert len(sizes) == 1


def test_bars_are_as_long_as_the_probabilities():
    picture = _draw(count=2, actor=[1.0, 0.5], adviser=[0.0, 0.25], mix=[0.0, float("nan")])
    actor = _length(picture, "actor")
    full, half = actor[0], actor[-1]
    assert full > WIDTH * 0.4 and full == pytest.approx(2 * half, abs=2)
    assert _length(picture, "adviser")[-1] == pytest.approx(full / 4, abs=2)
    assert not _length(picture, "mix")


def test_nothing_is_drawn_over_the_frame_or_the_edges():
    long = "W" * 400
    picture = _draw(
        count=4, caption=long, actions=[long] * 4, choice=long, option=long, predicted_return=-1e300
    )
    assert (picture[:384:6, :384:6] == FRAME).all()
    assert (picture[:, -panel.MARGIN // 2 :] == panel.BACKGROUND).all()
    assert (picture[-panel.MARGIN // 2 :, 384:] == panel.BACKGROUND).all()
