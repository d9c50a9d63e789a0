"""Published results in Crafter, each with its source and its budget in env steps.

The protocol is Crafter's own: success rates over all training episodes in a world of 64 x 64 cells.
"""

from typing import NamedTuple

CRAFTER = ("Crafter's scoreboard", "https://github.com/danijar/crafter")
DLLM = ("arXiv 2406.07381", "https://arxiv.org/abs/2406.07381")


class Result(NamedTuple):
    """One row of a table of results; None is what was not told."""

    name: str
    score: str  # percent
    reward: str | None  # mean return of the training episodes at the end
    budget: str  # env steps
    source: tuple[str, str]  # name and address


RESULTS = (
    Result("random actions", "1.6 ± 0.0", "2.1 ± 1.3", "1M", CRAFTER),
    Result("RND, without reward", "2.0 ± 0.1", "0.7 ± 1.3", "1M", CRAFTER),
    Result("Plan2Explore, without reward", "2.1 ± 0.1", "2.1 ± 1.5", "1M", CRAFTER),
    Result("Rainbow", "4.3 ± 0.2", "6.0 ± 1.3", "1M", CRAFTER),
    Result("PPO", "4.6 ± 0.3", "4.2 ± 1.2", "1M", CRAFTER),
    Result("DreamerV2", "10.0 ± 1.2", "9.0 ± 1.7", "1M", CRAFTER),
    Result("DreamerV3, 200M parameters", "14.5 ± 1.6", "11.7 ± 1.9", "1M", CRAFTER),
    Result("PPO with ResNet", "15.6 ± 1.6", "10.3 ± 0.5", "1M", CRAFTER),
    Result("DreamerV3 with Curious Replay", "19.4 ± 1.6", None, "1M", CRAFTER),
    Result("Achievement Distillation", "21.8 ± 1.4", "12.6 ± 0.3", "1M", CRAFTER),
    Result("DLLM: goals of GPT-4", "26.4 ± 1.3", "12.4", "1M", DLLM),
    Result("DLLM: goals of GPT-4", "38.1", None, "5M", DLLM),
    Result("SPRING: GPT-4 acts", "27.3 ± 1.2", "12.3 ± 0.7", "no training", CRAFTER),
    Result("human experts", "50.5 ± 6.8", "14.3 ± 2.3", "no training", CRAFTER),
)

# In percent, means over seeds after 1M env steps: the bars of plots/spectrum-*.pdf in danijar/crafter (commit
# e04542a), read from the vector graphics. Those of random actions agree with the data in its folder scores/.
RATES_BUDGET = "1M"
RATES_SOURCE = ("danijar/crafter, plots/spectrum", "https://github.com/danijar/crafter/tree/main/plots")
RATES = {
    "random actions": {
        "collect_coal": 0.0, "collect_diamond": 0.0, "collect_drink": 9.32, "collect_iron": 0.0,
        "collect_sapling": 50.19, "collect_stone": 0.01, "collect_wood": 24.38, "defeat_skeleton": 0.02,
        "defeat_zombie": 0.14, "eat_cow": 0.38, "eat_plant": 0.01, "make_iron_pickaxe": 0.0,
        "make_iron_sword": 0.0, "make_stone_pickaxe": 0.0, "make_stone_sword": 0.0, "make_wood_pickaxe": 0.32,
        "make_wood_sword": 0.32, "place_furnace": 0.0, "place_plant": 44.62, "place_stone": 0.01,
        "place_table": 4.36, "wake_up": 93.6,
    },
    "PPO": {
        "collect_coal": 0.44, "collect_diamond": 0.0, "collect_drink": 30.33, "collect_iron": 0.0,
        "collect_sapling": 66.66, "collect_stone": 3.05, "collect_wood": 83.03, "defeat_skeleton": 0.25,
        "defeat_zombie": 1.96, "eat_cow": 12.0, "eat_plant": 0.0, "make_iron_pickaxe": 0.0,
        "make_iron_sword": 0.0, "make_stone_pickaxe": 0.04, "make_stone_sword": 0.05,
        "make_wood_pickaxe": 21.1, "make_wood_sword": 20.14, "place_furnace": 0.07, "place_plant": 65.04,
        "place_stone": 1.7, "place_table": 66.1, "wake_up": 92.48,
    },
    "DreamerV2": {
        "collect_coal": 14.75, "collect_diamond": 0.0, "collect_drink": 79.95, "collect_iron": 0.01,
        "collect_sapling": 86.58, "collect_stone": 42.75, "collect_wood": 92.69, "defeat_skeleton": 2.57,
        "defeat_zombie": 53.08, "eat_cow": 17.15, "eat_plant": 0.07, "make_iron_pickaxe": 0.0,
        "make_iron_sword": 0.0, "make_stone_pickaxe": 0.18, "make_stone_sword": 0.27,
        "make_wood_pickaxe": 59.6, "make_wood_sword": 40.23, "place_furnace": 1.77, "place_plant": 84.38,
        "place_stone": 29.01, "place_table": 85.67, "wake_up": 92.76,
    },
}  # fmt: skip
