"""Our classes reproduce the reference DreamerV3's numbers (tests/data/golden/README.md says what they are).

All sizes come from the files: LORE_GOLDEN_DIR may name another folder of the same form.
"""

import json
import os
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import distributions as dists
import models
import networks
from config import Config
from tools import LaProp

GOLDEN = Path(os.environ.get("LORE_GOLDEN_DIR", Path(__file__).parent / "data" / "golden"))
ATOL = 1e-5
IMAGE_RTOL = 1e-4  # for losses that sum over an image


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as data:
        return {k: torch.from_numpy(data[k]) if data[k].ndim else data[k].item() for k in data}


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, atol: float = ATOL, rtol: float = 1e-5
) -> None:
    """`rtol` covers float32 rounding of the returns, which reach 1e5 here; it is far below any real fault."""
    torch.testing.assert_close(actual.detach(), expected, atol=atol, rtol=rtol)


def assert_close_at_scale(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """For sums over the two-hot bins, which reach 5e8.

    float32 keeps a share of the largest term, and the order of the sum decides on the last digits.
    """
    assert_close(actual, expected, atol=ATOL * max(1.0, expected.abs().max().item()))


def test_symlog_and_symexp():
    g = golden("symlog")
    assert_close(dists.symlog(g["x"]), g["symlog"])
    assert_close(dists.symexp(dists.symlog(g["x"])), g["symexp_of_symlog"])


def test_twohot():
    g = golden("twohot")
    bins = dists.symexp_bins(len(g["bins"]))
    assert_close(bins, g["bins"], rtol=1e-5)
    dist = dists.TwoHot(g["logits"], bins)
    assert_close(dist.loss(g["target"]), g["loss"])
    assert_close_at_scale(dist.mean, g["pred"])
    zero = dists.TwoHot(torch.zeros(*g["pred_at_zero_logits"].shape, len(bins)), bins)
    assert torch.equal(zero.mean, torch.zeros_like(zero.mean))


def test_onehot():
    g = golden("onehot")
    dist, other = (dists.OneHot(g[k], g["unimix"], dims=1) for k in ("logits", "other"))
    assert_close(dist.log_prob(g["event"]), g["logp"])
    assert_close(dist.entropy(), g["entropy"])
    assert_close(dist.kl(other), g["kl"])


def test_bounded_normal():
    g = golden("bounded_normal")
    dist = dists.bounded_normal(g["raw_mean"], g["raw_std"], g["min_std"], g["max_std"])
    assert_close(dist.mean, g["mean"])
    assert_close(dist.std, g["std"])
    assert_close(dist.log_prob(g["action"]), g["logp"])
    assert_close(dist.entropy(), g["entropy"])


def test_binary():
    g = golden("binary")
    dist = dists.Binary(g["logit"])
    assert_close(dist.loss(g["target"]), g["loss"])
    assert_close(dist.prob, g["prob"])


def test_symlog_mse():
    g = golden("symlog_mse")
    assert_close(dists.MSE(g["pred"], 1, squash=True).loss(g["target"]), g["loss"])


def test_lambda_return():
    g = golden("lambda_return")
    ret = models.lambda_return(g["last"], g["term"], g["reward"], g["boot"], g["disc"], g["lam"])
    assert_close(ret, g["ret"])


def actor_critic(g: dict, retnorm: models.ReturnNorm) -> tuple[dict, torch.Tensor]:
    """The imagination and replay value losses on recorded outputs of actor and critics."""
    bins = dists.symexp_bins(g["value_logits"].shape[-1])

    def twohot(key: str) -> dists.TwoHot:
        return dists.TwoHot(g[key], bins)

    value, logits = twohot("value_logits"), g["policy_logits"][:, :-1]
    policy = networks.Policy([dists.OneHot(logits, g["unimix"])], [logits.shape[-1]])
    action = torch.nn.functional.one_hot(g["action_index"].long(), logits.shape[-1]).float()[:, :-1]
    losses, ret, _ = models.imagination_losses(
        policy, action, g["imag_reward"], g["imag_cont"], value.mean.detach(), value,
        twohot("slow_value_logits"), retnorm, lam=g["lam"], entropy_scale=g["entropy_scale"],
    )  # fmt: skip
    losses["repval"] = models.replay_value_loss(
        g["replay_last"], g["replay_term"], g["replay_reward"], g["replay_boot"],
        twohot("replay_value_logits")[:, :-1], twohot("replay_slow_value_logits")[:, :-1],
        1 - 1 / g["horizon"], g["lam"],
    )  # fmt: skip
    return losses, ret


def test_actor_critic_losses_over_two_calls():
    retnorm = models.ReturnNorm()
    for call in range(2):
        g = golden(f"actor_critic_{call}")
        losses, ret = actor_critic(g, retnorm)
        assert_close_at_scale(ret, g["ret"])
        assert_close_at_scale(losses["policy"], g["policy_loss"])
        # Returns of 1e5 are sums of terms of 1e8: their rounding moves the target's weights between two bins.
        assert_close(losses["value"], g["value_loss"], rtol=2e-4)
        assert_close(losses["repval"], g["replay_value_loss"], rtol=2e-4)
        assert_close_at_scale(retnorm.range, torch.tensor([g["retnorm_lo"], g["retnorm_hi"]]))


def test_actor_critic_gradients():
    g, grads = golden("actor_critic_0"), golden("gradients")
    names = ("policy_logits", "value_logits", "replay_value_logits")
    for name in names:
        g[name].requires_grad_(True)
    losses, _ = actor_critic(g, models.ReturnNorm())
    sum(loss.mean() for loss in losses.values()).backward()
    for name in names:
        expected = grads[f"ac:{name}_grad"]
        assert_close(g[name].grad, expected, atol=1e-4 * expected.abs().max().item())


# --- Networks ------------------------------------------------------------------------------------------


def golden_config(g: dict) -> Config:
    """The sizes of the golden networks, as the options from which training builds its own."""
    dims = json.loads((GOLDEN / "dims.json").read_text())["dims"]

    def count(prefix: str, suffix: str = "/kernel") -> int:
        return sum(k.startswith(f"param:{prefix}") and k.endswith(suffix) for k in g)

    depths = [g[f"param:enc/cnn{i}/kernel"].shape[-1] for i in range(count("enc/cnn"))]
    cnn = {
        "cnn_depth": dims["depth"],
        "cnn_mults": [d // dims["depth"] for d in depths],
        "mlp_keys": ".*",
        "cnn_keys": ".*",
        "audio_keys": "audio",
        "mlp_units": dims["units"],
        "strided": False,
    }
    head = {"units": dims["units"]}
    return Config(
        {
            "encoder": {**cnn, "mlp_layers": count("enc/mlp")},
            "decoder": {**cnn, "mlp_layers": count("dec/mlp")},
            "rssm": {
                **{k: dims[k] for k in ("deter", "hidden", "stoch", "classes", "blocks")},
                "free_nats": 1.0,
            },
            "reward_head": {
                **head,
                "bins": g["param:rew/head/logits/kernel"].shape[-1],
                "dist": "symexp_twohot",
            },
            "cont_head": head,
            "actor": {**head, "layers": count("pol/mlp"), "unimix": 0.01},
            "audio": {"sample_rate": 0},
            "horizon": 333,
            "replay_context": 1,
        }
    )


def our_names(wm: models.WorldModel, actor: networks.Actor) -> dict[str, torch.nn.Module]:
    """The reference's layer names and the modules of ours that stand for them."""
    names: dict[str, torch.nn.Module] = {}

    def dense(name: str, layer: networks.Dense, norm: str | None = None) -> None:
        names[name], names[norm or f"{name}norm"] = layer[0], layer[1]

    for i, layer in enumerate(wm.encoder.mlp):
        dense(f"enc/mlp{i}", layer)
    for i, (conv, norm) in enumerate(zip(wm.encoder.cnn.convs, wm.encoder.cnn.norms, strict=True)):
        names[f"enc/cnn{i}"], names[f"enc/cnn{i}norm"] = conv, norm
    rssm = wm.rssm
    for i, layer in enumerate((rssm.in_deter, rssm.in_stoch, rssm.in_action)):
        dense(f"dyn/dynin{i}", layer)
    names["dyn/dynhid0"], names["dyn/dynhid0norm"] = rssm.dyn_first, rssm.dyn_norm
    names["dyn/dyngru"] = rssm.gru
    for i, layer in enumerate(rssm.prior_net[0]):
        dense(f"dyn/prior{i}", layer)
    names["dyn/priorlogit"] = rssm.prior_net[1]
    names["dyn/obs0"], names["dyn/obs0norm"] = rssm.post_first, rssm.post_norm
    names["dyn/obslogit"] = rssm.post_out
    dec = wm.decoder
    for i, layer in enumerate(dec.mlp):
        dense(f"dec/mlp/linear{i}", layer, f"dec/mlp/norm{i}")
    names["dec/vec/vector/pred"] = dec.vector
    names["dec/sp0"], names["dec/spnorm"] = dec.cnn.from_deter, dec.cnn.norm
    dense("dec/sp1", dec.cnn.from_stoch[0])
    names["dec/sp2"] = dec.cnn.from_stoch[1]
    count = len(dec.cnn.convs)
    for i, (conv, norm) in enumerate(zip(dec.cnn.convs, dec.cnn.norms, strict=True)):
        names[f"dec/conv{count - 1 - i}"], names[f"dec/conv{count - 1 - i}norm"] = conv, norm
    names["dec/imgout"] = dec.cnn.out
    for i, layer in enumerate(wm.reward_head.mlp):
        dense(f"rew/mlp/linear{i}", layer, f"rew/mlp/norm{i}")
    names["rew/head/logits"] = wm.reward_head.out
    for i, layer in enumerate(actor.mlp):
        dense(f"pol/mlp/linear{i}", layer, f"pol/mlp/norm{i}")
    names["pol/head/action/mean"], names["pol/head/action/stddev"] = actor.outs[0], actor.std_outs[0]
    return names


def our_layout(value: torch.Tensor) -> torch.Tensor:
    """Linear kernels [in, out] -> [out, in], convolutions HWIO -> OIHW; block kernels and vectors stay."""
    if value.dim() == 2:
        return value.T
    return value.permute(3, 2, 0, 1) if value.dim() == 4 else value


def our_parameter(names: dict[str, torch.nn.Module], golden_name: str) -> torch.nn.Parameter:
    layer, kind = golden_name.rsplit("/", 1)
    return names[layer].bias if kind == "bias" else names[layer].weight


@pytest.fixture(scope="module")
def net():
    g = golden("modules")
    config = golden_config(g)
    dims = json.loads((GOLDEN / "dims.json").read_text())["dims"]
    obs_space = {
        "image": gymnasium.spaces.Box(0, 255, tuple(g["in:image"].shape[2:]), np.uint8),
        "vector": gymnasium.spaces.Box(-np.inf, np.inf, tuple(g["in:vector"].shape[2:]), np.float32),
        "reward": gymnasium.spaces.Box(-np.inf, np.inf, (), np.float32),
    }
    actions = networks.ActionVector({"action": gymnasium.spaces.Box(-1, 1, (dims["act"],), np.float32)})
    wm = models.WorldModel(obs_space, actions, config)
    actor = networks.Actor(wm.rssm.feat_size, actions, config.actor)
    names = our_names(wm, actor)
    loaded = set()
    with torch.no_grad():
        for key, value in g.items():
            if key.startswith("param:"):
                parameter = our_parameter(names, key[len("param:") :])
                parameter.copy_(our_layout(value))
                loaded.add(parameter)
    ours = {*wm.parameters(), *actor.parameters()} - {*wm.cont_head.parameters()}
    assert loaded == ours, "a parameter of ours has no counterpart in the reference"
    return g, wm, actor, names


def observed(g: dict, wm: models.WorldModel) -> dict[str, torch.Tensor]:
    """Our posterior scan over the recorded samples."""
    obs = {"image": g["in:image"], "vector": g["in:vector"], "is_first": g["in:reset"]}
    batch, length = g["in:reset"].shape
    start = wm.rssm.initial(batch)
    noise = wm.rssm.noise(batch, length, generator=None)
    return wm.rssm.observe(
        start, wm.encoder(obs), g["in:action"], g["in:reset"], noise, forced=g["out:obs_stoch"]
    )


def test_encoder(net):
    g, wm, *_ = net
    obs = {"image": g["in:image"], "vector": g["in:vector"], "is_first": g["in:reset"]}
    assert_close(wm.encoder(obs), g["out:tokens"])


def test_rssm_core_and_prior(net):
    g, wm, *_ = net
    state = {"deter": g["in:deter"], "stoch": g["in:stoch"]}
    weights = wm.rssm.split_weights()
    deter = wm.rssm.core(state, wm.rssm.action_input(g["in:action"][:, 0], weights), weights)
    assert_close(deter, g["out:core_deter"])
    assert_close(wm.rssm.prior(deter), g["out:prior_logit"])


def test_posterior_scan_and_kl(net):
    g, wm, *_ = net
    post = observed(g, wm)
    assert_close(post["deter"], g["out:obs_deter"])
    assert_close(post["logit"], g["out:obs_post_logit"])
    rssm = wm.rssm
    losses = models.kl_losses(rssm.dist(post["logit"]), rssm.dist(rssm.prior(post["deter"])), wm.free_nats)
    assert_close(losses["dyn"], g["out:dyn_loss"])
    assert_close(losses["rep"], g["out:rep_loss"])


def test_decoder(net):
    g, wm, *_ = net
    recons = wm.decoder(g["out:obs_deter"], wm.rssm.flat(g["out:obs_stoch"]))
    assert_close(recons["image"].mean, g["out:image_mean"])
    assert_close(recons["vector"].raw, g["out:vector_pred"])
    assert_close(recons["image"].loss(g["in:image"].float() / 255), g["out:image_loss"], rtol=IMAGE_RTOL)
    assert_close(recons["vector"].loss(g["in:vector"]), g["out:vector_loss"])


def test_heads(net):
    g, wm, actor, _ = net
    reward = wm.reward_head(g["in:feat"])
    assert_close(reward.logits, g["out:reward_logits"])
    assert_close_at_scale(reward.mean, g["out:reward_pred"])
    policy = actor(g["in:feat"]).parts[0]
    assert_close(policy.mean, g["out:policy_mean"])
    assert_close(policy.std, g["out:policy_std"])


def test_world_model_gradients(net):
    g, wm, _, names = net
    grads = golden("gradients")
    wm.zero_grad()
    post = observed(g, wm)
    terminal = torch.zeros_like(g["in:reset"])
    data = {"image": g["in:image"], "vector": g["in:vector"], "is_first": g["in:reset"]}
    losses, _ = wm.loss(post, {**data, "reward": grads["in:reward"], "is_terminal": terminal})
    for name in ("dyn", "rep", "image", "vector", "reward"):
        assert_close(losses[name], grads[f"loss:{name}"], rtol=IMAGE_RTOL)
    scales = {"dyn": 1.0, "rep": 0.1, "image": 1.0, "vector": 1.0, "reward": 1.0}
    total = sum(scale * losses[name].mean() for name, scale in scales.items())
    assert abs(total.item() - grads["out:total"]) < IMAGE_RTOL * grads["out:total"]
    total.backward()
    checked = 0
    for key, value in grads.items():
        if key.startswith("grad:"):
            expected = our_layout(value)
            tolerance = 1e-4 * expected.abs().max().item()
            assert_close(our_parameter(names, key[len("grad:") :]).grad, expected, atol=tolerance, rtol=0)
            checked += 1
    assert checked > 0


# --- Optimiser and initialisation ----------------------------------------------------------------------


def test_optimizer():
    g = golden("optimizer")
    names = [k.split(":")[1] for k in g if k.startswith("param0:")]
    params = {name: torch.nn.Parameter(g[f"param0:{name}"].clone()) for name in names}
    opt = LaProp(
        params.values(), lr=g["lr"], warmup=g["warmup"], agc=g["agc"], agc_floor=g["agc_pmin"],
        beta1=g["beta1"], beta2=g["beta2"], eps=g["eps"],
    )  # fmt: skip
    steps = sum(k.startswith("grad") and k.endswith(f":{names[0]}") for k in g)
    for step in range(steps):
        for name, param in params.items():
            param.grad = g[f"grad{step}:{name}"].clone()
        opt.step()
        for name, param in params.items():
            # An absolute error of 1e-5 would hide a whole step of the learning rate 4e-5.
            assert_close(param, g[f"param{step + 1}:{name}"], atol=1e-7)


def test_initialiser():
    g = golden("init")
    torch.manual_seed(0)
    linear = networks.Linear(*[int(x) for x in g["linear_shape"]])
    kernel, _, inputs, outputs = (int(x) for x in g["conv_shape"])
    conv = networks.Conv(inputs, outputs, kernel)
    for name, weight in (("linear", linear.weight), ("conv", conv.weight)):
        # Random numbers of another generator; without the correction for the cut it would be 14 % off.
        assert abs(weight.std().item() / g[f"{name}_std"] - 1) < 0.05
        assert abs(weight.abs().max().item() / g[f"{name}_absmax"] - 1) < 0.05
