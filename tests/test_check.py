"""envs.check and the checks of the first steps: each fault is found, with its cure."""

import re
import types

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import config as configs
import envs
from basics import UserError
from envs import check as checks
from envs.adapter import Adapter


class Good:
    """A correct environment; subclasses have faults."""

    def __init__(self, task, size):
        self.size = size
        self.obs_space = {
            "image": spaces.Box(0, 255, (*size, 3), np.uint8),
            "state": spaces.Box(-1, 1, (3,), np.float32),
        }
        self.act_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, seed=None):
        self.random, self.steps = np.random.default_rng(seed), 0
        self.length = int(self.random.integers(5, 40))
        return self.obs(is_first=True), {}

    def step(self, action):
        self.steps += 1
        terminated = self.steps >= self.length
        return self.obs(is_last=terminated, is_terminal=terminated), 1.0, terminated, False, {}

    def obs(self, **flags):
        flags = dict.fromkeys(("is_first", "is_last", "is_terminal"), False) | flags
        return {"image": self.render(), "state": self.random.uniform(-1, 1, 3).astype(np.float32), **flags}

    def render(self):
        return np.full((*self.size, 3), self.steps % 256, np.uint8)


def faulty(name: str, level: str, what: str, cure: str, *, space=(), obs=(), **methods) -> type[Good]:
    """A `Good` environment with other spaces, observations or methods, and the fault to be found."""

    class Faulty(Good):
        fault = (level, what, cure)

        def __init__(self, task, size):
            super().__init__(task, size)
            self.obs_space |= dict(space)

        def obs(self, **flags):
            return {**super().obs(**flags), **dict(obs)}

    return type(name, (Faulty,), methods)


def box(low, high, shape, dtype=np.float32):
    return spaces.Box(low, high, shape, dtype)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


class BadRender(Good):
    fault = ("warning", r"render\(\) returned float64 \(64, 64, 3\)", r"\[H, W, 3\] of uint8")

    def __init__(self, task, size):
        super().__init__(task, size)
        del self.obs_space["image"]

    def obs(self, **flags):
        return {key: value for key, value in super().obs(**flags).items() if key != "image"}

    def render(self):
        return np.zeros((*self.size, 3))


class RenderRaises(Good):
    fault = ("note", r"render\(\) raised RuntimeError: no screen", "fix it")  # a note, since it has an image

    def obs(self, **flags):
        state = self.random.uniform(-1, 1, 3).astype(np.float32)
        return {"image": zeros(*self.size, 3, dtype=np.uint8), "state": state}

    def render(self):
        raise RuntimeError("no screen")


class Unbounded(Good):
    fault = ("warning", "the action is unbounded", "finite bounds")

    def __init__(self, task, size):
        super().__init__(task, size)
        self.act_space = box(-np.inf, np.inf, (2,))


def reset_with_length(length):
    def reset(self, seed=None):
        result = Good.reset(self, seed)
        self.length = length
        return result

    return reset


def render_noise(self):
    noise = np.random.default_rng().integers(0, 99, (*self.size, 3), np.uint8)
    return noise if self.steps else Good.render(self)


def reset_without_seed(self):
    self.resets = getattr(self, "resets", 0) + 1
    return Good.reset(self, self.resets)


def step_with_nan(self, action):
    obs, _, *rest = Good.step(self, action)
    return obs, np.nan, *rest


def step_with_four_values(self, action):
    obs, reward, terminated, _, info = Good.step(self, action)
    return obs, reward, terminated, info


# Faults that need steps or calls that a run does not make.
ONLY_CHECKED = [
    BadRender,
    RenderRaises,
    faulty("NeverEnds", "note", "no episode ended within", "--time_limit N", reset=reset_with_length(10**9)),
    faulty(
        "Crashes", "error", r"ValueError: .* in test_check.py line \d+", "'s code",
        step=lambda self, action: np.zeros(3).reshape(2, 2),
    ),
]  # fmt: skip
FOUND_IN_RUNS = [
    Unbounded,
    faulty("Shape", "error", r"'state': expected float32 \(3,\), got float32 \(2,\)", "declare the shape",
           obs={"state": zeros(2)}),
    faulty("Type", "error", r"'state': expected float32 \(3,\), got complex64", "np.asarray",
           obs={"state": zeros(3, dtype=np.complex64)}),
    faulty("Precision", "note", r"'state': expected float32 \(3,\), got float64", "np.asarray",
           obs={"state": zeros(3, dtype=np.float64)}),
    faulty("NotANumber", "error", "'state': expected finite values, got NaN", "division by zero",
           obs={"state": np.full(3, np.nan, np.float32)}),
    faulty("Empty", "error", r"'state' has shape \(0,\)", "leave it out",
           space={"state": box(-1, 1, (0,))}, obs={"state": zeros(0)}),
    faulty("OutOfBounds", "warning", "'state' is outside the bounds of its space, -1.0 to 1.0", "wider",
           obs={"state": np.full(3, 2, np.float32)}),
    faulty("UndeclaredKey", "error", "'extra': expected no such key, got the key", "declare it",
           obs={"extra": zeros(2)}),
    faulty("MissingKey", "error", "'more': expected the key, got no such key", "every key of obs_space",
           space={"more": box(-1, 1, (3,))}),
    faulty("FloatImage", "error", "'image' looks like an image of float32", r"np.uint8\(255 \* image\)",
           space={"image": box(0, 1, (64, 64, 3))}, obs={"image": zeros(64, 64, 3)}),
    faulty("ChannelsFirst", "error", r"'image' looks like an image \[C, H, W\]: \(3, 64, 64\)", "transpose",
           space={"image": box(0, 255, (3, 64, 64), np.uint8)}, obs={"image": zeros(3, 64, 64, dtype="u1")}),
    faulty("Undeclared", "error", r"'image': expected uint8 .*, got uint8 \(3, 64, 64\)", "transpose",
           obs={"image": zeros(3, 64, 64, dtype="u1")}),
    faulty("Random", "warning", "same seed and actions gave a different state at step 0", "default_rng",
           reset=lambda self, seed=None: Good.reset(self)),
    faulty("RandomLater", "warning", "same seed and actions gave a different image at step 1", "default_rng",
           render=render_noise),
    faulty("NoSeed", "warning", "takes no seed", "seed=None", reset=reset_without_seed),
    faulty("RewardNaN", "error", "'reward': expected a finite number, got nan", "", step=step_with_nan),
    faulty("FourValues", "note", "four values", "terminated, truncated", step=step_with_four_values),
    faulty("TimeLimit", "warning", "terminated after exactly 20 steps", "truncated",
           reset=reset_with_length(20)),
]  # fmt: skip


def add(monkeypatch, env) -> configs.Config:
    monkeypatch.setitem(envs.REGISTRY, "planted", env)
    return configs.load(["--task", "planted_env"])


def test_correct_env_is_fine_and_its_speed_is_reported(monkeypatch, capsys):
    add(monkeypatch, Good)
    assert checks.main(["planted_env"]) == 0
    out = capsys.readouterr().out
    assert "planted_env is fine" in out and "steps per second" in out
    assert "error" not in out and "warning" not in out and "note" not in out


@pytest.mark.parametrize("env", FOUND_IN_RUNS + ONLY_CHECKED, ids=lambda env: env.__name__)
def test_each_fault_is_found_with_its_cure(monkeypatch, capsys, env):
    config = add(monkeypatch, env)
    level, what, cure = env.fault
    report = checks.check(config)
    found = [fault for fault in report.faults if re.search(what, fault.what)]
    assert len(found) == 1, str(report)
    assert found[0].level == level and re.search(cure, found[0].cure)
    others = [fault for fault in report.faults if fault not in found and fault.level != "note"]
    if env.__name__ != "NoSeed":  # it is not deterministic either
        assert all(level == "error" for _ in others), others  # an error may cause others
    assert checks.main(["planted_env"]) == (1 if level == "error" else 0)
    assert found[0].cure in capsys.readouterr().out


@pytest.mark.parametrize("env", FOUND_IN_RUNS, ids=lambda env: env.__name__)
def test_first_steps_of_a_run_find_the_same_faults(monkeypatch, env):
    config = add(monkeypatch, env)
    level, what, cure = env.fault

    def run():
        made = envs.make_env(config, "eval", 0)
        while len(made.ends) < 3:
            obs = made.reset()[0]
            while not obs["is_last"]:
                obs = made.step({"action": np.zeros(2, np.float32)})[0]
        return made.notes()

    if level == "error":
        with pytest.raises(UserError, match=f"planted_env.*{what}.*Cure: .*{cure}"):
            run()
    else:
        assert any(re.search(f"{what}.*{cure}", note) for note in run())


@pytest.mark.parametrize("task", ["custom_task_name", "dummy_mixed", "dummy_continuous", "tvroom_noise"])
def test_own_environments_have_no_errors(task):
    assert checks.check(configs.load(["--task", task])).errors == 0


@pytest.mark.parametrize(
    "argv, message",
    [([], "which task"), (["custm_x"], "Did you mean custom"), (["custom_x", "--sizo", "3"], "--size")],
)
def test_mistake_in_the_command_is_one_line(capsys, argv, message):
    assert checks.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and len(error.splitlines()) == 1


# Adapter


class Foreign(gymnasium.Env):
    """Nested, discrete and text observations with other names."""

    observation_space = spaces.Dict(
        {
            "pixels": spaces.Box(0, 255, (32, 48, 3), np.uint8),
            "robot": spaces.Dict({"arm": spaces.Box(-1, 1, (2, 2), np.float64), "mode": spaces.Discrete(3)}),
            "switches": spaces.MultiBinary(4),
            "mission": spaces.Text(10),
            "is_first": spaces.Discrete(2),
        }
    )
    action_space = spaces.Discrete(3)

    def __init__(self, render_mode=None):
        assert render_mode == "rgb_array"
        self.taken = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action):
        self.taken.append(action)
        return self._obs(), np.array([1.5]), False, False, {}

    def _obs(self):
        robot = {"arm": np.ones((2, 2)), "mode": np.int64(2)}
        return {
            "pixels": np.zeros((32, 48, 3), np.uint8),
            "robot": robot,
            "switches": np.array([1, 0, 0, 1], np.int8),
            "mission": "go",
            "is_first": 0,
        }


def test_keys_are_renamed_nested_spaces_flattened_and_discrete_ones_one_hot(monkeypatch):
    monkeypatch.setitem(envs.REGISTRY, "foreign", Foreign)
    config = configs.load(["--task", "foreign_x"])
    env = envs.make_env(config, "train", 0)
    flags = {"reward", "is_first", "is_last", "is_terminal"}
    assert set(env.obs_space) - flags == {"image", "robot_arm", "robot_mode", "switches"}
    obs = env.reset()[0]
    assert obs["image"].shape == (64, 64, 3) and obs["robot_arm"].shape == (2, 2)
    assert obs["robot_mode"].tolist() == [0, 0, 1] and obs["switches"].tolist() == [1, 0, 0, 1]
    assert obs["is_first"]
    obs = env.step({"action": 0})[0]
    assert env.taken == [0] and obs["reward"] == 1.5 and not obs["is_first"]
    notes = "\n".join(env.notes())
    assert "'pixels' is renamed to 'image'" in notes and "32x48 pixels are resized to 64x64" in notes
    assert "'mission'" in notes and "left out" in notes
    assert env.notes() == []


@pytest.mark.parametrize(
    "space, key",
    [(spaces.Box(0, 255, (64, 64, 3), np.uint8), "image"), (spaces.Box(-1, 1, (3,), np.float32), "vector")],
)
@pytest.mark.parametrize("name", [None, "observation"])
def test_single_observation_becomes_image_or_vector(space, key, name):
    env = types.SimpleNamespace(
        observation_space=spaces.Dict({name: space}) if name else space,
        action_space=spaces.Discrete(2),
        reset=lambda seed=None: ({name: space.sample()} if name else space.sample(), {}),
        step=lambda action: (space.sample(), 0.0, False, False, {}),
    )
    adapted = Adapter(env)
    assert list(adapted.obs_space) == list(adapted.reset(seed=0)[0]) == [key]


@pytest.mark.parametrize(
    "info, flag, ends",
    [
        ({}, None, (True, False)),
        ({"TimeLimit.truncated": True}, None, (False, True)),
        ({"TimeLimit.truncated": False}, None, (True, False)),
        ({}, False, (False, True)),
        ({}, True, (True, False)),
    ],
)
def test_done_of_old_envs_is_terminated_or_truncated(info, flag, ends):
    class Old(Good):
        def reset(self):
            return super().reset(0)[0]

        def step(self, action):
            obs = self.obs(is_terminal=flag)
            if flag is None:
                del obs["is_terminal"]
            return obs, 0.0, True, info

    env = Adapter(Old("x", (16, 16)))
    assert set(env.reset(seed=3)[0]) == {"image", "state"}
    assert env.step(np.zeros(2))[2:4] == ends


@pytest.mark.parametrize(
    "task, message",
    [
        ("custom_no_such_module:Env", "Cannot import no_such_module: no_such_module is not a module in"),
        ("custom_envs.custom_env:CustomEnvv", "Did you mean CustomEnv"),
        ("custom_mypackage.my_env", "write custom_mypackage.my_env:MyEnv"),
    ],
)
def test_unknown_class_path_is_explained(task, message):
    with pytest.raises(UserError, match=message):
        envs.make_env(configs.load(["--task", task]), "train", 0)


@pytest.mark.parametrize(
    "lack, message", [("step", r"no step\(\)"), ("act_space", "no act_space or action_space")]
)
def test_missing_attribute_is_named(lack, message):
    parts = {name: getattr(Good("x", (16, 16)), name) for name in ("obs_space", "act_space", "reset", "step")}
    del parts[lack]
    with pytest.raises(UserError, match=message):
        Adapter(types.SimpleNamespace(**parts))


def test_constructor_that_raises_is_reported_with_its_line(monkeypatch, capsys):
    class Broken:
        def __init__(self):
            raise SystemExit("no robot here")

    config = add(monkeypatch, Broken)
    report = checks.check(config)
    assert [fault.level for fault in report.faults] == ["error"]
    assert "SystemExit: no robot here, in test_check.py line" in report.faults[0].what
