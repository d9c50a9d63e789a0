"""Something small is learned from pixels, in both precisions. Minutes each: pytest -m slow.

The options set the sizes of networks and images, learning rates and warm-up; all else is the `cpu` preset.
"""

import json
import shlex

import pytest

import dreamer
from envs.dummy import CUE_LENGTH, MEMORY_LENGTH

SMALL = shlex.split(
    "--size 32 32 --encoder.cnn_mults 2 3 4"
    " --encoder.mlp_units 128 --decoder.mlp_units 128 --reward_head.units 128 --cont_head.units 128"
    " --rssm.deter 256 --rssm.hidden 128 --rssm.stoch 8 --rssm.classes 8"
    " --actor.units 128 --critic.units 128"
    " --opt.lr 1e-3 --model_lr 1e-3 --actor_lr 2e-4 --opt.warmup 50"
)
RUN = shlex.split("--device cpu --threads 1 --eval_every 2000 --eval_episodes 20 --video_pred_log False")
SOLVED = 0.9  # of the best return; a random agent gets a quarter


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "precision", "learners", "best", "steps"),
    [
        ("dummy_cue", "float32", 1, CUE_LENGTH, 16000),
        ("dummy_cue", "float32", 2, CUE_LENGTH, 16000),
        ("dummy_memory", "bfloat16", 1, MEMORY_LENGTH - 1, 18000),
    ],
)
def test_a_cue_is_learned_from_pixels(task, precision, learners, best, steps, tmp_path):
    returns = []
    for until in range(6000, steps + 1, 2000):  # each run resumes the one before
        command = ["--configs", task, "cpu", *SMALL, *RUN, "--precision", precision]
        command += ["--parallel", str(learners)]
        assert dreamer.main([*command, "--steps", str(until), "--logdir", str(tmp_path)]) == 0
        lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        returns = [line["eval/episode_return"] for line in lines if "eval/episode_return" in line]
        if returns[-1] >= SOLVED * best:
            return
    pytest.fail(f"the evaluations returned {returns}, and {SOLVED * best} solves {task}")
