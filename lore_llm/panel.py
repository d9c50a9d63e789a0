"""A picture of one decision: the env's frame, and next to it caption, choice and probabilities."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FRAME_PIXELS = 384  # the longer side of the enlarged frame, about
FONT_PIXELS = 13
LINE = 16  # pixels from one line of text to the next
MARGIN = 8
CAPTION_LINES = 14  # shown at most, so that all pictures of an episode have one size
MAX_ROWS = 48  # actions shown at most
BAR = 3  # pixels that a bar is high; each action has three,
BARS_TOP = 4  # which begin so many below its line
NAME_SHARE = 0.4  # of the panel's width, for the names of actions
PERCENT = 34  # pixels for the numbers next to the bars

BACKGROUND, TROUGH = (24, 24, 28), (48, 48, 56)
TEXT, FAINT, CHOSEN = (225, 225, 225), (150, 150, 158), (255, 221, 87)
COLORS = {"actor": (86, 156, 240), "adviser": (244, 142, 60), "mix": (110, 200, 120)}


def decision_panel(frame: np.ndarray, info: Mapping[str, Any], width: int) -> np.ndarray:
    """Draw a decision next to the frame in which it was taken.

    Args:
        frame: uint8 [H, W, 3]; enlarged by a whole factor.
        info: `caption`, `actions` (names [A]), the probabilities `actor` [A], `adviser` [A] or None without
            advice, and `mix` [A], which was sampled from; `beta`, `choice` (one of the names), `option` (the
            name of the running skill, or None), `value` and `predicted_return`.
        width: pixels of the panel; 300 or more are readable.

    Returns:
        uint8 [H', W', 3], both even, as mp4 requires. The size depends only on the frame's size, the number
        of actions and `width`.
    """
    factor = max(1, round(FRAME_PIXELS / max(frame.shape[:2])))
    frame = np.repeat(np.repeat(frame, factor, 0), factor, 1)  # [H, W, 3]
    rows = min(len(info["actions"]), MAX_ROWS) + (len(info["actions"]) > MAX_ROWS)
    height = max(frame.shape[0], 2 * MARGIN + (CAPTION_LINES + rows + 5) * LINE)
    size = (_even(frame.shape[1] + width), _even(height))
    picture = Image.new("RGB", size, BACKGROUND)
    picture.paste(Image.fromarray(frame), (0, 0))
    draw = ImageDraw.Draw(picture)
    left, right = frame.shape[1] + MARGIN, frame.shape[1] + width - MARGIN

    y = MARGIN
    for index, line in enumerate(_wrap(str(info["caption"]), right - left)):
        draw.text((left, y + index * LINE), line, TEXT, _font())
    y += CAPTION_LINES * LINE + LINE // 2
    option = "" if info["option"] is None else f", by skill {info['option']}"
    draw.text((left, y), _cut(f"Chose {info['choice']}{option}", right - left), CHOSEN, _font())
    y += LINE
    numbers = f"value {info['value']:.3g}, predicted return {info['predicted_return']:.3g}"
    draw.text((left, y), _cut(f"{numbers}, beta {info['beta']:.2f}", right - left), TEXT, _font())
    y += LINE + LINE // 2
    _draw_legend(draw, left, y, info["adviser"] is None)
    _draw_actions(draw, left, right, y + LINE + LINE // 2, info)
    return np.asarray(picture)


def _draw_legend(draw: ImageDraw.ImageDraw, x: float, y: int, silent: bool) -> None:
    for name, color in COLORS.items():
        label = f"{name} (silent)" if name == "adviser" and silent else name
        draw.rectangle((x, y + 4, x + 8, y + 12), color)
        draw.text((x + 13, y), label, FAINT if label != name else TEXT, _font())
        x += 13 + _font().getlength(label) + 2 * MARGIN


def _draw_actions(draw: ImageDraw.ImageDraw, left: int, right: int, y: int, info: Mapping[str, Any]) -> None:
    start, end = left + int((right - left) * NAME_SHARE), right - PERCENT
    for index, name in enumerate(info["actions"][:MAX_ROWS]):
        color = CHOSEN if name == info["choice"] else TEXT
        draw.text((left, y), _cut(name, start - left - MARGIN), color, _font())
        for bar, (who, bar_color) in enumerate(COLORS.items()):
            top = y + BARS_TOP + bar * (BAR + 1)
            draw.rectangle((start, top, end, top + BAR - 1), TROUGH)
            if info[who] is not None and (filled := round(_share(info[who][index]) * (end - start))):
                draw.rectangle((start, top, start + filled, top + BAR - 1), bar_color)
        draw.text((right, y), f"{_share(info['mix'][index]):.0%}", color, _font(), anchor="ra")
        y += LINE
    if len(info["actions"]) > MAX_ROWS:
        draw.text((left, y), f"and {len(info['actions']) - MAX_ROWS} more", FAINT, _font())


@lru_cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT_PIXELS)


def _even(size: int) -> int:
    return size + size % 2


def _share(value: float) -> float:
    """A probability, within the bounds that can be drawn."""
    return min(max(float(value), 0.0), 1.0) if math.isfinite(value) else 0.0


def _plain(text: str) -> str:
    """The font has ASCII only."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)


@lru_cache(1024)
def _cut(text: str, width: float) -> str:
    """The text, shortened with dots if it is wider."""
    text = _plain(text[: int(width)])  # a character is wider than a pixel
    if _font().getlength(text) <= width:
        return text
    while text and _font().getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


@lru_cache(64)
def _wrap(text: str, width: float) -> tuple[str, ...]:
    """The text in at most CAPTION_LINES lines, wrapped between words."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in _plain(paragraph).split(" "):
            longer = f"{line} {word}" if line else word
            if line and _font().getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
        if len(lines) > CAPTION_LINES:
            lines[CAPTION_LINES - 1] += " ..."
            break
    return tuple(_cut(line, width) for line in lines[:CAPTION_LINES])
