"""How windows are drawn from the replay's streams: uniformly, or by curiosity through a sum tree.

A window is `window` steps in a row of one stream. `heads` are the positions that the streams write next, of
which the last `rows` are kept. N is the number of slots of all streams.
"""

import numpy as np


def window_counts(heads: np.ndarray, rows: int, window: int) -> np.ndarray:
    """How many windows each stream holds. [n_envs]"""
    return np.maximum(np.minimum(heads, rows) - window + 1, 0)


class Uniform:
    """Draws each window of each stream with the same probability."""

    nbytes = 0

    def __init__(self, rows: int, window: int):
        self.rows, self.window = rows, window

    def draw(self, amount: int, heads: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(stream, start) of `amount` windows. int64 [amount, 2]"""
        ends = np.cumsum(window_counts(heads, self.rows, self.window))
        index = rng.integers(ends[-1], size=amount)
        env = np.searchsorted(ends, index, side="right")
        # The last window of a stream is the last of its share of the indices.
        start = heads[env] - self.window - (ends[env] - 1 - index)
        return np.stack([env, start], 1)

    def add(self, slots: np.ndarray) -> None:
        """All steps are alike."""

    def update(self, slots: np.ndarray, loss: np.ndarray) -> None:
        """All losses are alike."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Nothing to keep."""
        return {}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Nothing was kept."""


class Curious:
    """Curious Replay (arXiv 2306.15934): draws what was seen seldom or is predicted badly.

    The priority of a step that was trained on v times, last with the loss l, is
    c * beta**v + (|l| + eps)**alpha. A new step gets the largest priority so far. A window is drawn by the
    priority of its first step after the context.

    Priorities are kept for every step. The tree holds only those of steps at which a window can begin, and
    learns what has changed just before a draw: O(log N) for each changed step.
    """

    def __init__(self, n_envs, rows, window, context, *, c=1e4, beta=0.7, alpha=0.7, eps=0.01):
        self.rows, self.window, self.context = rows, window, context
        self.c, self.beta, self.alpha, self.eps = c, beta, alpha, eps
        self.priority = np.zeros(n_envs * rows, np.float32)  # [N]
        self.visits = np.zeros(n_envs * rows, np.int32)  # [N]
        self.largest = np.float32(c + eps**alpha)
        self.tree = SumTree(n_envs * rows)
        self.offsets = np.arange(n_envs) * rows
        self.synced = np.zeros(n_envs, np.int64)  # heads that the tree knows
        self.changed: list[np.ndarray] = []  # slots with new priorities that it does not know

    @staticmethod
    def bytes_for(steps: int) -> int:
        """What the sampler needs for so many steps."""
        return 8 * steps + SumTree.bytes_for(steps)

    @property
    def nbytes(self) -> int:
        return self.bytes_for(len(self.priority))

    def add(self, slots: np.ndarray) -> None:
        """Take new steps."""
        self.priority[slots] = self.largest
        self.visits[slots] = 0

    def update(self, slots: np.ndarray, loss: np.ndarray) -> None:
        """Count a visit of these steps and take their losses [n]. Those that are not finite are skipped."""
        finite = np.isfinite(loss)
        slots, loss = slots[finite], loss[finite]
        np.add.at(self.visits, slots, 1)  # a step may be in several windows of the batch
        novelty = self.c * self.beta ** self.visits[slots].astype(np.float64)
        self.priority[slots] = novelty + (np.abs(loss) + self.eps) ** self.alpha
        self.largest = max(self.largest, self.priority[slots].max(initial=0))
        self.changed.append(slots)

    def draw(self, amount: int, heads: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(stream, start) of `amount` windows. int64 [amount, 2]"""
        self._sync(heads)
        slots = self.tree.find(rng.random(amount))
        env = slots // self.rows
        return np.stack([env, self._position(slots, heads) - self.context], 1)

    def _position(self, slots: np.ndarray, heads: np.ndarray) -> np.ndarray:
        """Position of the step that each slot holds; negative for none yet."""
        last = heads[slots // self.rows] - 1
        return last - (last - slots) % self.rows  # stream offsets are multiples of rows

    def _sync(self, heads: np.ndarray) -> None:
        changed = self.changed
        for env in np.flatnonzero(heads != self.synced):
            # New steps complete windows that begin before them, and evict one that begins after them.
            start = max(self.synced[env], heads[env] - self.rows) - self.window
            moved = np.arange(start, heads[env] + self.context)[-self.rows :]
            changed.append(moved % self.rows + self.offsets[env])
        if changed:
            slots = np.concatenate(changed)
            start = self._position(slots, heads) - self.context
            env = slots // self.rows
            valid = (start >= np.maximum(heads[env] - self.rows, 0)) & (start + self.window <= heads[env])
            self.tree.set(slots, np.where(valid, self.priority[slots], 0))
        self.changed = []
        self.synced = heads.copy()

    def arrays(self) -> dict[str, np.ndarray]:
        """What the next run needs."""
        return {"priority": self.priority, "visits": self.visits, "largest": self.largest}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what `arrays` gave; nothing makes all steps new."""
        if arrays:
            self.priority[:], self.visits[:] = arrays["priority"], arrays["visits"]
            self.largest = arrays["largest"][()]
        self.synced[:] = 0


class SumTree:
    """Weights of `size` slots in a binary tree of sums. Node 1 is the root, 2i and 2i + 1 are below i."""

    def __init__(self, size: int):
        self.depth = max(1, (size - 1).bit_length())
        self.nodes = np.zeros(2 << self.depth)  # float64; the last half are the slots

    @staticmethod
    def bytes_for(size: int) -> int:
        return 8 * (2 << max(1, (size - 1).bit_length()))

    def set(self, slots: np.ndarray, weights: np.ndarray) -> None:
        """Set weights [n] and all sums above them."""
        nodes = slots + (1 << self.depth)
        self.nodes[nodes] = weights
        for _ in range(self.depth):
            nodes = nodes >> 1
            # Neighbours share parents; where the same one comes again later, it gets the same sum again.
            nodes = nodes[np.diff(nodes, prepend=0) != 0]
            self.nodes[nodes] = self.nodes[2 * nodes] + self.nodes[2 * nodes + 1]

    def find(self, shares: np.ndarray) -> np.ndarray:
        """The slots [n] at which the running sum of weights passes these shares (0 to 1) of the total."""
        rest = shares * self.nodes[1]
        node = np.ones(len(shares), np.int64)
        for _ in range(self.depth):
            left = self.nodes[2 * node]
            # Rounding must not lead to a branch without weight.
            right = (rest >= left) & (self.nodes[2 * node + 1] > 0)
            rest = np.where(right, rest - left, rest)
            node = 2 * node + right
        return node - (1 << self.depth)
