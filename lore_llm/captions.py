"""Captions: descriptions of situations as text, for advisers.

A captioner reads the observation of one environment, mainly its array `symbolic` (envs/symbolic.py): the
state of the game, cropped to what the image shows, which the agent does not observe. Captions are quantised,
so that similar situations have equal text, which is the cache key of advice. They are made on demand.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

import envs
from basics import UserError
from envs.symbolic import KEY

Obs = Mapping[str, np.ndarray]


class Captioner:
    """Base class of captioners, and the one for environments without `symbolic`: it summarises their vectors.

    Subclass it for your own environment and select it by `--llm.captioner package.module:Class`. It is
    constructed as `Class(actions, obs_space)`. Most subclasses only define `caption`.

    Attributes:
        actions: Names of the actions, in order, as advice uses them.
        subgoals: All subgoals that advice may name. `reached` must support them.
        rules: The embedded rules (rules.py) that understand the captions, or None.
        about: Constant background for the prompt, such as the rules of the game.
    """

    subgoals: tuple[str, ...] = ()
    rules: str | None = None
    about: str = ""

    NUMBERS = 48  # most numbers of one vector
    KEYS = 12  # most observations

    def __init__(self, actions: Sequence[str], obs_space: Mapping[str, spaces.Space]):
        self.actions = tuple(actions)
        described = sorted(key for key, space in obs_space.items() if _is_described(key, space))
        self._described = described[: self.KEYS]

    def caption(self, obs: Obs) -> str:
        """The situation in words. Equal situations should have equal text: leave out what does not matter."""
        return "\n".join(f"{key}: {_summary(np.asarray(obs[key]), self.NUMBERS)}" for key in self._described)

    def reached(self, subgoal: str, before: Obs, now: Obs) -> bool:
        """Whether `subgoal` was reached between two observations of an episode."""
        return False

    def blocked(self, before: Obs, now: Obs, action: int) -> bool:
        """Whether `action`, taken at `before` and followed by `now`, had no visible effect."""
        return False


def make_captioner(config: Any, obs_space: Mapping[str, Any], act_space: Mapping[str, Any]) -> Captioner:
    """The captioner of `config.task`, or the one that `config.llm.captioner` names.

    `obs_space` and `act_space` are those of `envs.make_env`. Raises UserError unless the action is one
    Discrete, and for a captioner that cannot be used.
    """
    parts = list(act_space.values())
    if len(parts) != 1 or not isinstance(parts[0], spaces.Discrete):
        listed = ", ".join(f"{key} {space}" for key, space in act_space.items())
        raise UserError(
            f"llm: advice needs one Discrete action; {config.task} has {listed}. Use --llm.enabled False."
        )
    amount = int(parts[0].n)
    suite = config.task.partition("_")[0]
    known = KNOWN.get(suite) if KEY in obs_space else None
    names = list(known.action_names() if known else [])
    switches = config.noisy_tv.actions if config.noisy_tv.enabled else 0
    own = amount - switches  # the task's own actions
    names = [*names[:own], *(f"action_{index}" for index in range(len(names), own))]
    names += [f"tv_{index + 1}" for index in range(switches)]
    if config.llm.captioner != "auto":
        captioner = _load(config.llm.captioner)(names, obs_space)
        if len(captioner.actions) != amount:
            raise UserError(
                f"--llm.captioner {config.llm.captioner} names {len(captioner.actions)} actions; "
                f"{config.task} has {amount}."
            )
        return captioner
    return (known or Captioner)(names, obs_space)


def _load(path: str) -> type[Captioner]:
    if ":" not in path:
        raise UserError(f"--llm.captioner {path}: write auto, or package.module:Class.")
    found = envs.load_class(path)
    if not (isinstance(found, type) and issubclass(found, Captioner)):
        raise UserError(f"--llm.captioner {path} is not a subclass of lore_llm.captions.Captioner.")
    return found


# --- Any environment: numbers ------------------------------------------------------------------------------

FLAGS = ("reward", "is_first", "is_last", "is_terminal", "discount", KEY)
HALF_DECADES = 2  # numbers are rounded to 0.1, 0.3, 1, 3, 10, ...: two steps per factor of ten
SMALLEST, LARGEST = 0.05, 1000.0  # smaller numbers become 0, larger ones LARGEST


def _is_described(key: str, space: Any) -> bool:
    return key not in FLAGS and not key.startswith(("log_", "llm_")) and isinstance(space, spaces.Box)


def _summary(value: np.ndarray, limit: int) -> str:
    """A short description of an image or a vector."""
    if value.dtype == np.uint8 and value.ndim == 3:
        return "an image is seen"
    flat = value.ravel().astype(np.float64)
    hot = np.flatnonzero(flat)
    if flat.size > 1 and hot.size == 1 and flat[hot[0]] == 1:
        return f"number {hot[0]} of {flat.size}"
    numbers = " ".join(_rounded(number) for number in flat[:limit].tolist())
    return numbers + (f" and {flat.size - limit} more" if flat.size > limit else "")


def _rounded(number: float) -> str:
    """A number rounded to half a decade: 0, ±0.1, ±0.3, ±1, ±3, ..., ±1000."""
    size = min(abs(number), LARGEST)
    if not size >= SMALLEST:  # NaN too
        return "0"
    power = 10 ** (round(math.log10(size) * HALF_DECADES) / HALF_DECADES)
    return f"{math.copysign(float(f'{power:.1g}'), number):g}"


# --- Crafter -----------------------------------------------------------------------------------------------

MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down
LEVELS = ((4, "low"), (8, "middle"))  # vitals below the number; else high
NEAR = 3  # largest distance of near things
OPEN = 3  # free fields in a row that make a direction open
DAY, NIGHT = 60, 30  # percent of daylight
STEP, DIG = 1, 2  # path cost of a free field, and of one that must be dug first


class CrafterCaptioner(Captioner):
    """Crafter: the nearest thing of each kind with distance, direction and first step, and the player."""

    rules = "crafter"

    def __init__(self, actions: Sequence[str], obs_space: Mapping[str, spaces.Space]):
        import crafter

        from envs.crafter import KINDS, SYMBOLIC, VIEW

        super().__init__(actions, obs_space)
        game = crafter.constants
        self._layout, self._width, self._height = SYMBOLIC, *VIEW
        self._kinds = [kind.replace("_", " ") for kind in KINDS]
        self._walkable = {KINDS.index(kind) for kind in game.walkable}
        self._player = KINDS.index("player")
        # Kinds that become walkable when they are collected, with the tools that this requires.
        self._diggable = {
            KINDS.index(kind): tuple(info["require"].items())
            for kind, info in game.collect.items()
            if info["leaves"] in game.walkable and kind not in game.walkable
        }
        self._creatures = {KINDS.index(kind) for kind in ("cow", "zombie", "skeleton", "ripe_plant")}
        self._movers = {KINDS.index(kind) for kind in ("cow", "zombie", "skeleton", "arrow")}
        self._items = list(game.items)
        self._vitals = ("health", "food", "drink", "energy")
        self._enough = _enough(game)
        self._achievements = list(game.achievements)
        self.subgoals = tuple(game.achievements)
        self.about = about_crafter(game)

    @staticmethod
    def action_names() -> list[str]:
        import crafter

        return crafter.constants.actions

    def caption(self, obs: Obs) -> str:
        parts = self._layout.unpack(obs[KEY])
        view = parts["view"].tolist()
        items = dict(zip(self._items, parts["inventory"].tolist(), strict=True))
        facing = next(name for name, move in MOVES.items() if move == tuple(parts["facing"].tolist()))
        x, y = self._width // 2, self._height // 2
        around = []
        for name, (dx, dy) in MOVES.items():
            way = self._free_way(view, dx, dy)
            space = ", open" if way >= OPEN else ", short" if way else ""
            if not way and self._is_deep(view, dx, dy):
                space = ", deep"
            around.append(f"{name} {self._kinds[view[x + dx][y + dy]]}{space}")
        light = int(parts["daylight"])
        lines = [
            f"Facing: {facing}",
            f"Around you: {'; '.join(around)}",
            f"You see: {'; '.join(self._seen(view, items)) or 'nothing else'}",
            f"Within reach to craft: {self._stations(view)}",
            f"You have: {self._inventory(items)}",
            f"You are: {', '.join(f'{name} {_level(items[name])}' for name in self._vitals)}",
            f"It is {'day' if light >= DAY else 'night' if light < NIGHT else 'twilight'}; "
            f"you are {'asleep' if parts['asleep'] else 'awake'}"
            + (", walled in" if self._is_walled_in(view) else ""),
        ]
        counts = zip(self._achievements, parts["achievements"].tolist(), strict=True)
        done = [name for name, count in counts if count]
        return "\n".join([*lines, f"Achieved: {', '.join(done) or 'nothing yet'}"])

    def reached(self, subgoal: str, before: Obs, now: Obs) -> bool:
        index = self._achievements.index(subgoal)
        counts = [self._layout.unpack(obs[KEY])["achievements"][index] for obs in (before, now)]
        return bool(counts[1] > counts[0])

    def blocked(self, before: Obs, now: Obs, action: int) -> bool:
        name = self.actions[action]
        old, new = (self._layout.unpack(obs[KEY]) for obs in (before, now))
        if name == "noop" or name.startswith("tv_"):
            return False
        if name == "sleep":
            return not new["asleep"]
        if old["asleep"] and new["asleep"]:
            return True
        x, y = self._width // 2, self._height // 2
        if name.startswith("move_"):
            dx, dy = MOVES[name[len("move_") :]]
            turned = (old["facing"] != new["facing"]).any()
            return not turned and int(old["view"][x + dx, y + dy]) not in self._walkable
        gained = (old["achievements"] != new["achievements"]).any()
        if name != "do":  # place or make
            return not gained
        dx, dy = old["facing"].tolist()
        target = int(old["view"][x + dx, y + dy])
        hit = target in self._creatures or target in self._walkable  # blows and bad luck are invisible
        return not gained and not hit

    def _free_way(self, view: list[list[int]], dx: int, dy: int) -> int:
        """Number of free fields in a straight line from the player."""
        x, y = self._width // 2 + dx, self._height // 2 + dy
        length = 0
        while 0 <= x < self._width and 0 <= y < self._height and view[x][y] in self._walkable:
            x, y, length = x + dx, y + dy, length + 1
        return length

    def _is_deep(self, view: list[list[int]], dx: int, dy: int) -> bool:
        """Whether a tunnel of two fields in a direction would have walls on all other sides."""
        x, y = self._width // 2, self._height // 2
        if view[x + dx][y + dy] not in self._diggable:
            return False
        tunnel = [(x + dx, y + dy), (x + 2 * dx, y + 2 * dy)]
        walls = [(a + side * dy, b + side * dx) for a, b in tunnel for side in (-1, 1)]
        walls.append((x + 3 * dx, y + 3 * dy))
        return all(view[a][b] not in self._walkable | self._movers for a, b in tunnel + walls)

    def _is_walled_in(self, view: list[list[int]]) -> bool:
        """Whether no creature can reach the player, as far as is visible."""
        start = self._width // 2, self._height // 2
        seen, todo = {start}, [start]
        while todo:
            x, y = todo.pop()
            for dx, dy in MOVES.values():
                place = x + dx, y + dy
                if place in seen:
                    continue
                if not (0 <= place[0] < self._width and 0 <= place[1] < self._height):
                    return False
                kind = view[place[0]][place[1]]
                if kind in self._movers:
                    return False
                if kind in self._walkable:
                    seen.add(place)
                    todo.append(place)
        return True

    def _seen(self, view: list[list[int]], items: Mapping[str, int]) -> list[str]:
        """The nearest thing of each kind: distance, direction and first step of the shortest path."""
        ways = self._ways(view, items)
        x0, y0 = self._width // 2, self._height // 2
        best: dict[int, tuple] = {}
        for x, column in enumerate(view):
            for y, kind in enumerate(column):
                if kind in (0, self._player):
                    continue
                cost, first = ways.get((x, y), (math.inf, ""))
                rank = cost, abs(x - x0) + abs(y - y0), x, y, first
                if kind not in best or rank < best[kind]:
                    best[kind] = rank
        lines = []
        for kind in sorted(best):
            _, distance, x, y, first = best[kind]
            if distance == 1:
                if kind not in self._walkable:
                    lines.append(f"{self._kinds[kind]} beside {_where(x - x0, y - y0)}")
                continue  # the ground next to the player is described elsewhere
            far = "near" if distance <= NEAR else "far"
            way = f"go {first}" if first else "no way"
            lines.append(f"{self._kinds[kind]} {far} {_where(x - x0, y - y0)}, {way}")
        return lines

    def _ways(
        self, view: list[list[int]], items: Mapping[str, int]
    ) -> dict[tuple[int, int], tuple[int, str]]:
        """Path cost and first move for each field of the view that can be reached."""
        costs = dict.fromkeys(self._walkable, STEP)
        for kind, tools in self._diggable.items():
            if all(items[tool] >= amount for tool, amount in tools):
                costs[kind] = DIG
        start = self._width // 2, self._height // 2
        found: dict[tuple[int, int], tuple[int, str]] = {start: (0, "")}
        heap = [(0, 0, start, "")]
        number = 0  # breaks ties: of equal costs the older goes first
        while heap:
            cost, _, (x, y), first = heapq.heappop(heap)
            for name, (dx, dy) in MOVES.items():
                place = x + dx, y + dy
                if place in found or not (0 <= place[0] < self._width and 0 <= place[1] < self._height):
                    continue
                found[place] = cost, first or name
                step = costs.get(view[place[0]][place[1]])
                if step:
                    number += 1
                    heapq.heappush(heap, (cost + step, number, place, first or name))
        return found

    def _stations(self, view: list[list[int]]) -> str:
        """Table and furnace near enough to be used: next to the player, diagonally too."""
        x, y = self._width // 2, self._height // 2
        near = {kind for column in view[x - 1 : x + 2] for kind in column[y - 1 : y + 2]}
        names = [self._kinds[kind] for kind in sorted(near) if self._kinds[kind] in ("table", "furnace")]
        return ", ".join(names) or "nothing"

    def _inventory(self, items: Mapping[str, int]) -> str:
        listed = []
        for name, count in items.items():
            if count and name not in self._vitals:
                most = self._enough[name]
                more = "+" if count >= most > 1 else ""
                listed.append(f"{min(count, most)}{more} {name.replace('_', ' ')}")
        return ", ".join(listed) or "nothing"


def _level(value: int) -> str:
    return next((word for bound, word in LEVELS if value < bound), "high")


def _where(dx: int, dy: int) -> str:
    vertical = "up" if dy < 0 else "down" if dy > 0 else ""
    return "-".join(filter(None, (vertical, "left" if dx < 0 else "right" if dx > 0 else "")))


def _enough(game: Any) -> dict[str, int]:
    """For each item the number that all recipes together use: more of it makes no difference."""
    total = dict.fromkeys(game.items, 0)
    for info in [*game.place.values(), *game.make.values()]:
        for item, amount in info["uses"].items():
            total[item] += amount
    return {item: max(1, amount) for item, amount in total.items()}


def _listed_recipes(game: Any) -> str:
    lines = []
    for kind, info in game.collect.items():
        needs = ", ".join(info["require"]).replace("_", " ")
        chance = f", with probability {info['probability']}" if "probability" in info else ""
        gets = ", ".join(info["receive"])
        lines.append(f"- do, facing {kind}: {gets}{chance}{f'; needs {needs}' if needs else ''}")
    for name, info in game.place.items():
        uses = ", ".join(f"{amount} {item}" for item, amount in info["uses"].items())
        lines.append(f"- place_{name}: uses {uses}; onto {', '.join(info['where'])} in front of you")
    for name, info in game.make.items():
        uses = ", ".join(f"{amount} {item}" for item, amount in info["uses"].items())
        near = " and ".join(f"a {each}" for each in info["nearby"])
        lines.append(f"- make_{name}: uses {uses}; needs {near} within one field of you, corners too")
    return "\n".join(lines)


def about_crafter(game: Any) -> str:
    """The rules of the game, with the recipes of `crafter.constants`."""
    return f"""\
You play Crafter, a survival game on a grid that is seen from above. Each achievement counts once an episode;
dying ends it. Moving towards something that is not free turns to face it. `do` acts on the field in front:
{_listed_recipes(game)}
- do, facing a cow: eat it, after several blows. do, facing a ripe plant: eat it; a sapling that was
  placed ripens slowly, and creatures eat it. do, facing a zombie or skeleton: fight; swords help.
- sleep restores energy; you wake up when it is full, or when hurt. Zombies come on grass, most at night,
  and hit a sleeper hard: sleep `walled in`, where the free fields around you lead nowhere. Skeletons live
  in caves and shoot arrows.
- Food, drink and energy fall with time; at 0 of any health falls. Lava kills whoever steps on it.
Distances in captions: beside (next to you), near (up to {NEAR} fields), far. `go left` is the first step
of the shortest way to stand beside a thing; `no way` means that none is seen. `open` is a direction with
{OPEN} or more free fields, `short` one with fewer; in a `deep` one a tunnel of two fields can be dug that
has walls around. Vitals are low (below {LEVELS[0][0]} of 9), middle (below {LEVELS[1][0]}) or high. \
Amounts with a + may be larger."""


# --- MiniGrid ----------------------------------------------------------------------------------------------

COMPASS = ("east", "south", "west", "north")  # of direction 0 to 3
DOORS = ("open", "closed", "locked")  # of a door's state 0 to 2
SIGNS = {"unseen": "?", "empty": ".", "floor": ".", "wall": "#", "goal": "G", "lava": "~"}
SIGNS |= {"door": "D", "key": "K", "ball": "O", "box": "B", "agent": "A"}
CARRIED = ("key", "ball", "box")
MAX_THINGS = 16  # in a caption


class MiniGridCaptioner(Captioner):
    """MiniGrid and BabyAI: the mission, visible things with their positions, and a map of the view."""

    rules = "minigrid"
    subgoals = (
        *(f"pick_up_{kind}" for kind in CARRIED),
        "drop_object",
        "face_object",
        "open_door",
        "enter_doorway",
        "reach_goal",
    )
    about = """\
You play MiniGrid, a grid world that is seen from the player's own eyes: 6 fields ahead, 3 to either side;
walls and closed doors hide what is behind them. left and right turn by 90 degrees in place, forward moves
one field. pickup takes the key, ball or box directly ahead, drop lays what you carry there. toggle opens
or closes the door directly ahead; a locked one opens only while you carry the key of its colour. Green
goals end the episode with a reward, lava ends it without. You carry one thing at a time.
Positions in captions are relative to you: 2 ahead 1 left. In the map you are ^ and look up: # wall,
. free, ? not seen, D door, K key, O ball, B box, G goal, ~ lava."""

    def __init__(self, actions: Sequence[str], obs_space: Mapping[str, spaces.Space]):
        from minigrid.core.constants import IDX_TO_COLOR as colors
        from minigrid.core.constants import IDX_TO_OBJECT as kinds

        from envs import minigrid

        super().__init__(actions, obs_space)
        rest = minigrid.layout(0).size
        self._size = math.isqrt((obs_space[KEY].shape[0] - rest) // 3)  # side of the view
        self._layout = minigrid.layout(self._size)
        self._kinds = [kinds[index] for index in range(len(kinds))]
        self._colors = [colors[index] for index in range(len(colors))]
        words = list(minigrid.WORDS)
        self._words = dict(enumerate([*words, "something"], start=1))
        self._me = self._size // 2, self._size - 1  # the player in the view
        self._ahead = self._size // 2, self._size - 2

    @staticmethod
    def action_names() -> list[str]:
        from minigrid.core.actions import Actions

        return [action.name for action in Actions]

    def caption(self, obs: Obs) -> str:
        parts = self._layout.unpack(obs[KEY])
        view = parts["view"].tolist()
        things = []
        for x, column in enumerate(view):
            for y, (kind, color, state) in enumerate(column):
                name = self._kinds[kind]
                if name in ("unseen", "empty", "floor", "wall") or (x, y) == self._me:
                    continue
                ahead, side = self._me[1] - y, x - self._me[0]
                things.append((ahead + abs(side), ahead, side, self._named(name, color, state)))
        seen = [f"{name} {_relative(ahead, side)}" for _, ahead, side, name in sorted(things)[:MAX_THINGS]]
        kind, color, _ = view[self._me[0]][self._me[1]]
        carried = f"{self._colors[color]} {self._kinds[kind]}" if self._kinds[kind] in CARRIED else "nothing"
        below = self._kinds[int(parts["on"])]
        mission = " ".join(self._words[number] for number in parts["mission"].tolist() if number)
        lines = [
            f"Mission: {mission.replace(' ,', ',')}",
            f"You look {COMPASS[int(parts['direction'])]}",
            f"You carry: {carried}",
            f"You stand on: {'nothing' if below == 'empty' else below}",
            f"You see: {'; '.join(seen) or 'nothing but walls and floor'}",
            "Map:",
            *self._map(view),
        ]
        return "\n".join(lines)

    def reached(self, subgoal: str, before: Obs, now: Obs) -> bool:
        old, new = (self._layout.unpack(obs[KEY]) for obs in (before, now))
        carried = [self._kinds[int(parts["view"][self._me][0])] for parts in (old, new)]
        ahead = [self._kinds[int(parts["view"][self._ahead][0])] for parts in (old, new)]
        below = [self._kinds[int(parts["on"])] for parts in (old, new)]
        if subgoal.startswith("pick_up_"):
            return carried[0] != carried[1] == subgoal[len("pick_up_") :]
        if subgoal == "drop_object":
            return carried[0] in CARRIED and carried[1] not in CARRIED
        if subgoal == "face_object":
            return ahead[1] in CARRIED and ahead[0] != ahead[1]
        if subgoal == "enter_doorway":
            return below[1] == "door" != below[0]
        if subgoal == "reach_goal":
            return below[1] == "goal" != below[0]
        if subgoal == "open_door":  # one is open ahead, and one of its colour was seen shut before
            door, color, state = new["view"][self._ahead].tolist()
            shut = (old["view"][..., 0] == door) & (old["view"][..., 1] == color) & (old["view"][..., 2] > 0)
            return self._kinds[door] == "door" and DOORS[state] == "open" and bool(shut.any())
        raise ValueError(f"unknown subgoal {subgoal!r}")

    def blocked(self, before: Obs, now: Obs, action: int) -> bool:
        name = self.actions[action]
        if name in ("left", "right") or name.startswith("tv_"):
            return False
        if name == "forward":
            kind, _, state = self._layout.unpack(before[KEY])["view"][self._ahead].tolist()
            name = self._kinds[kind]
            return not (name in ("empty", "floor", "goal", "lava") or (name == "door" and state == 0))
        return np.array_equal(before[KEY], now[KEY])

    def _named(self, kind: str, color: int, state: int) -> str:
        if kind in ("goal", "lava"):
            return kind
        door = f"{DOORS[state]} " if kind == "door" else ""
        return f"{door}{self._colors[color]} {kind}"

    def _map(self, view: list[list[list[int]]]) -> list[str]:
        """A line for each row of the view, the farthest first, without far rows that are all unseen."""
        rows = []
        for y in range(self._size):
            signs = [SIGNS.get(self._kinds[view[x][y][0]], "?") for x in range(self._size)]
            if y == self._me[1]:
                signs[self._me[0]] = "^"
            rows.append("".join(signs))
        first = next(index for index, row in enumerate(rows) if row.strip("?"))
        return rows[first:]


def _relative(ahead: int, side: int) -> str:
    forward = f"{ahead} ahead" if ahead else ""
    sideways = f"{abs(side)} {'left' if side < 0 else 'right'}" if side else ""
    return " ".join(filter(None, (forward, sideways)))


KNOWN: dict[str, type[Captioner]] = {"crafter": CrafterCaptioner, "minigrid": MiniGridCaptioner}
