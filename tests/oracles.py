"""Independent NumPy implementations, float64, written from the formulas of the paper; slow and obvious on purpose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from unipool_jax.config.schema import Config


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def norm_router_scores(logits: np.ndarray, scale: float, constant: float, epsilon: float = 1e-8) -> np.ndarray:
    """scale * c * max(0, z / (|z| + epsilon)), token by token."""
    scores = np.zeros_like(logits, dtype=np.float64)
    for token, z in enumerate(logits.astype(np.float64)):
        scores[token] = scale * constant * np.maximum(0.0, z / (math.sqrt(float((z * z).sum())) + epsilon))
    return scores


def top_k(key: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest of each row, largest first, ties to the lowest index."""
    return np.argsort(-key, axis=-1, kind="stable")[:, :k]


def literal_constant(num_experts: int, k: int, draws: int) -> float:
    """NormRouter's c by the published algorithm, one draw at a time."""
    random = np.random.RandomState(42)
    total = 0.0
    for _ in range(draws):
        x = random.randn(num_experts)
        y = np.maximum(x / np.linalg.norm(x), 0.0)
        total += 1.0 / math.sqrt(float((np.sort(y)[::-1][:k] ** 2).sum()))
    return total / draws


def switch_loss(scores: np.ndarray, experts: np.ndarray, coefficient: float) -> float:
    """alpha E sum_i f_i P_i for one layer and one group of tokens."""
    tokens, num_experts = scores.shape
    k = experts.shape[1]
    total = 0.0
    for i in range(num_experts):
        fraction = float((experts == i).sum()) / (k * tokens)
        total += fraction * float(scores[:, i].mean())
    return coefficient * num_experts * total


def pool_loss(scores: list[np.ndarray], experts: list[np.ndarray], coefficient: float) -> float:
    """alpha M sum_i fbar_i Pbar_i over the layers of one pool (equations 4-6)."""
    tokens, num_experts = scores[0].shape
    k = experts[0].shape[1]
    fbar = np.mean([[(e == i).sum() / (k * tokens) for i in range(num_experts)] for e in experts], axis=0)
    pbar = np.mean([s.mean(0) for s in scores], axis=0)
    return float(coefficient * num_experts * (fbar * pbar).sum())


def rms_norm(x: np.ndarray, gain: np.ndarray, epsilon: float) -> np.ndarray:
    """Plain-gain RMSNorm over the last axis."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * gain


def rms_norm_gradients(
    x: np.ndarray, gain: np.ndarray, epsilon: float, upstream: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RMSNorm y = g x / r with r^2 = mean(x^2) + epsilon, and the gradients of sum(upstream * y), row by row.

    dx = g dy / r - x sum(g dy x) / (D r^3); dg = sum over rows of dy x / r.
    """
    output, x_grad, gain_grad = np.zeros(x.shape), np.zeros(x.shape), np.zeros(gain.shape)
    for row, (values, down) in enumerate(zip(x, upstream, strict=True)):
        r = math.sqrt(float((values**2).mean()) + epsilon)
        output[row] = gain * values / r
        x_grad[row] = gain * down / r - values * (gain * down * values).sum() / (len(values) * r**3)
        gain_grad += down * values / r
    return output, x_grad, gain_grad


def rotate(x: np.ndarray, base: float) -> np.ndarray:
    """Half-rotation rotary embedding of `[S, C]`, as complex multiplication of channel i and i + C/2."""
    length, channels = x.shape
    half = channels // 2
    angle = np.arange(length)[:, None] * np.array([base ** (-2 * i / channels) for i in range(half)])
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)


def visible(length: int, window: int | None = None, segments: np.ndarray | None = None) -> np.ndarray:
    """Which keys each query sees, bool `[S, S]`: t - w < s <= t, of its own segment."""
    seen = np.zeros((length, length), bool)
    for t in range(length):
        for s in range(t + 1):
            seen[t, s] = (window is None or s > t - window) and (segments is None or segments[s] == segments[t])
    return seen


def product(query: np.ndarray, key: np.ndarray, value: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """softmax(Q K^T / sqrt(C)) V of one sequence, `[S, H, C]` and `[S, J, C]`, head by head over what is seen."""
    output = np.zeros(query.shape)
    for head in range(query.shape[1]):
        shared = head // (query.shape[1] // key.shape[1])
        logits = query[:, head] @ key[:, shared].T / math.sqrt(query.shape[2])
        output[:, head] = softmax(np.where(seen, logits, -np.inf)) @ value[:, shared]
    return output


def product_gradients(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, seen: np.ndarray, upstream: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of sum(upstream * product).

    dV = P^T dO; with dP = dO V^T, dS = P (dP - sum P dP); dQ = dS K, dK = dS^T Q.
    """
    gradients = np.zeros(query.shape), np.zeros(key.shape), np.zeros(value.shape)
    scale = 1 / math.sqrt(query.shape[2])
    for head in range(query.shape[1]):
        shared = head // (query.shape[1] // key.shape[1])
        weights = softmax(np.where(seen, query[:, head] @ key[:, shared].T * scale, -np.inf))
        to_weights = upstream[:, head] @ value[:, shared].T
        to_scores = weights * (to_weights - (weights * to_weights).sum(1, keepdims=True)) * scale
        gradients[0][:, head] = to_scores @ key[:, shared]
        gradients[1][:, shared] += to_scores.T @ query[:, head]
        gradients[2][:, shared] += weights.T @ upstream[:, head]
    return gradients


def attention(
    x: np.ndarray,
    weights: dict[str, np.ndarray],
    heads: int,
    kv_heads: int,
    base: float,
    window: int | None = None,
) -> np.ndarray:
    """Causal grouped-query attention on one sequence `[S, D]`, head by head."""
    length = len(x)
    size = weights["query"].shape[1] // heads
    outputs = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        q = rotate(x @ weights["query"][:, head * size : (head + 1) * size], base)
        k = rotate(x @ weights["key"][:, shared * size : (shared + 1) * size], base)
        v = x @ weights["value"][:, shared * size : (shared + 1) * size]
        logits = q @ k.T / math.sqrt(size)
        logits[~visible(length, window)] = -np.inf
        outputs.append(softmax(logits) @ v)
    return np.concatenate(outputs, axis=1) @ weights["output"]


def expert(x: np.ndarray, bank: dict[str, np.ndarray], index: int) -> np.ndarray:
    """One SwiGLU expert on one token `[D]`."""
    gate = x @ bank["gate"][index]
    return (gate / (1 + np.exp(-gate)) * (x @ bank["up"][index])) @ bank["down"][index]


def exchange(
    hidden: np.ndarray, experts: np.ndarray, gates: np.ndarray, factors: np.ndarray, devices: int, room: int
) -> tuple[list[list[int]], np.ndarray]:
    """Tokens to experts that multiply by their factor, pair by pair: (tokens received by each device, outputs).

    A device receives, expert by expert, the tokens that chose it in their order, and drops what is beyond its room.
    """
    per_device, outputs, arrived = len(factors) // devices, np.zeros(hidden.shape), []
    for device in range(devices):
        own = range(device * per_device, (device + 1) * per_device)
        pairs = [(t, k) for e in own for t, chosen in enumerate(experts) for k, one in enumerate(chosen) if one == e]
        arrived.append([token for token, _ in pairs])
        for token, slot in pairs[:room]:
            outputs[token] += gates[token, slot] * factors[experts[token, slot]] * hidden[token]
    return arrived, outputs


def always_on(x: np.ndarray, weights: Any) -> np.ndarray:
    """S(h), or sigmoid(w . h) S(h) where there is a gate, of tokens `[N, D]`."""
    block = {name: matrix[None] for name, matrix in weights["block"].items()}
    output = np.stack([expert(token, block, 0) for token in x])
    if "sigmoid_gate" in weights:
        output = output / (1 + np.exp(-(x @ weights["sigmoid_gate"].T)))
    return output


class Forward:
    """Forward pass of the model on a batch, with what the losses need of every layer.

    Attributes:
      logits: `[B, S, V]`.
      scores, experts: one array per layer with experts, `[B S, E]` and `[B S, k]`.
      switched: with attention.kind=switch, by layer and sequence: logits, gates and disagreement (mean), `[S]` each.
      hidden: before each layer and after the last, `[B, S, D]`; normed: the output of the final norm.
    """

    def __init__(self, config: Config, params: Any, tokens: np.ndarray, expert_bias: np.ndarray | None = None):
        self.config = config
        wide = _as_float64(params)
        layers, banks, first = wide["pools"]["layers"], wide["pools"]["bank"], config.moe.dense_layers
        self.scores: list[np.ndarray] = []
        self.experts: list[np.ndarray] = []
        self.switched: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.hidden: list[np.ndarray] = []
        model = config.model
        x = wide["embedding"][tokens]
        for layer in range(model.num_layers):
            self.hidden.append(x)
            dense = layer < first
            pool, inner = divmod(layer - first, config.layers_per_pool)
            own = _index(wide["dense"], layer) if dense else _index(_index(layers, pool), inner)
            normed = rms_norm(x, own["attention_norm"], model.norm_epsilon)
            attended = np.stack([self._attend(s, own["attention"], layer) for s in normed])
            x = x + self._post_norm(attended, own, "attention_post_norm")
            normed = rms_norm(x, own["ffn_norm"], model.norm_epsilon).reshape(-1, model.hidden_size)
            if dense:
                x = x + self._post_norm(always_on(normed, own), own, "ffn_post_norm").reshape(x.shape)
                continue
            if config.moe.depth_vectors:
                normed = normed + own["depth"]
            bias = None if expert_bias is None else expert_bias[pool, inner]
            seen = None if config.windows is None else self._seen(layer - first)
            # The dense model has one expert, which has the only gate there is: 1.
            of_sum = model.post_norm_experts == "post"
            norm = {key: own[key] for key in ("ffn_post_norm",) if key in own and not of_sum}
            mixed = self._mixture(normed, own.get("mixture", {}) | norm, _index(banks, pool), bias, seen)
            if config.moe.shared_experts:
                ungated = self._post_norm(always_on(normed, {"block": own["shared"]["block"]}), norm, "ffn_post_norm")
                gate = own["shared"].get("sigmoid_gate")
                mixed = mixed + (ungated if gate is None else ungated / (1 + np.exp(-(normed @ gate.T))))
            mixed = self._post_norm(mixed, own if of_sum else {}, "ffn_post_norm")
            x = x + mixed.reshape(x.shape)
        self.hidden.append(x)
        self.normed = rms_norm(x, wide["final_norm"], model.norm_epsilon)
        self.logits = self.normed @ wide["output"].T

    def _attend(self, x: np.ndarray, own: dict[str, np.ndarray], layer: int) -> np.ndarray:
        model, settings = self.config.model, self.config.attention
        heads = model.num_heads, model.num_kv_heads, model.rope_base
        if settings.kind != "switch":
            return attention(x, own, *heads, self._window(layer))
        mixed = own | {"output": np.eye(own["query"].shape[1])}
        to_all, to_window = (attention(x, mixed, *heads, window) for window in (None, settings.window))
        logit = x @ own["switch"]
        full = np.array([z > 0 and t >= settings.window for t, z in enumerate(logit)])
        self.switched.append((logit, full, ((to_all - to_window) ** 2).mean(axis=1)))
        return np.where(full[:, None], to_all, to_window) @ own["output"]

    def _post_norm(self, output: np.ndarray, own: Any, name: str) -> np.ndarray:
        """RMSNorm with the gain of this name, where the layer has one."""
        return rms_norm(output, own[name], self.config.model.post_norm_epsilon) if name in own else output

    def _window(self, layer: int) -> int | None:
        """Positions that a layer sees at most; None is all."""
        attention = self.config.attention
        if attention.kind == "full":
            return None
        every = attention.full_layers
        full = (layer + 1) % every == 0 if isinstance(every, int) else layer in every
        return None if attention.kind == "alternating" and full else attention.window

    def _seen(self, layer: int) -> np.ndarray:
        """The experts of a layer's window, in the order of its router's rows."""
        windows = self.config.windows
        assert windows is not None
        return np.array([(windows.starts[layer] + j) % windows.experts for j in range(windows.widths[layer])])

    def _mixture(
        self, x: np.ndarray, own: Any, bank: Any, bias: np.ndarray | None, seen: np.ndarray | None
    ) -> np.ndarray:
        moe = self.config.moe
        if moe.router == "none":
            return np.stack([self._post_norm(expert(token, bank, 0), own, "ffn_post_norm") for token in x])
        # A narrow layer is the model of a router with as few rows.
        logits = x @ own["router"][: None if seen is None else len(seen)].T
        if moe.router == "norm":
            from unipool_jax.moe.routing import norm_constant  # its value has its own oracle

            constant = norm_constant(logits.shape[1], moe.top_k) if moe.score_constant == "monte_carlo" else 1.0
            scores = norm_router_scores(logits, float(own["scale"]), constant, moe.score_epsilon)
        elif moe.router == "softmax":
            scores = softmax(logits)
        elif moe.router == "sigmoid":
            scores = 1 / (1 + np.exp(-logits))
        else:
            raise NotImplementedError(moe.router)
        key = scores
        if seen is not None:
            narrow, hidden = scores, np.full((len(x), len(bank["gate"])), -np.inf)
            scores, key = np.zeros_like(hidden), hidden
            scores[:, seen], key[:, seen] = narrow, narrow
        experts = top_k(key if bias is None else key + bias, moe.top_k)
        self.scores.append(scores)
        self.experts.append(experts)
        out = np.zeros_like(x)
        for token in range(len(x)):
            gates = scores[token, experts[token]]
            if moe.router == "sigmoid" and moe.top_k > 1:
                gates = gates / (gates.sum() + 1e-20)
            for gate, index in zip(gates, experts[token], strict=True):
                out[token] += gate * self._post_norm(expert(x[token], bank, index), own, "ffn_post_norm")
        return out

    def counts(self, counted: np.ndarray | None = None) -> np.ndarray:
        """Choices per layer and expert `[L, E]`, of the positions that are `counted`, `[B, S]`."""
        return choice_counts(self.experts, self.scores[0].shape[1], counted)

    def lm_loss(self, targets: np.ndarray) -> float:
        """Mean cross-entropy in nats."""
        log_probability = np.log(softmax(self.logits))
        return float(-np.take_along_axis(log_probability, targets[..., None], -1).mean())


class Importances(Forward):
    """What each part of a model adds up to on a text, for pruning; every token counts.

    Attributes:
      layers: 1 - mean cosine of hidden states before and after.
      channels: absolute outputs of all pre-norms.
      groups: `[L, G]`, norms of the outputs of heads, summed over the heads that share keys.
      neurons: absolute activations by layer, expert and neuron.
      outputs: gate times norm of the expert's output, by layer and expert.
    """

    def __init__(self, config: Config, params: Any, tokens: np.ndarray):
        model = config.model
        layers, experts = model.num_layers, config.experts_per_pool
        self.channels = np.zeros(model.hidden_size)
        self.groups = np.zeros((layers, model.num_kv_heads))
        self.neurons = np.zeros((layers, experts, model.ffn_size))
        self.outputs = np.zeros((layers, experts))
        self._layer = 0
        super().__init__(config, params, tokens)
        self.channels += np.abs(self.normed).sum(axis=(0, 1))
        pairs = list(zip(self.hidden, self.hidden[1:], strict=False))
        self.layers = np.array([1 - np.mean([_cosine(a, b) for a, b in _tokens(*pair)]) for pair in pairs])

    def _attend(self, x: np.ndarray, own: dict[str, np.ndarray], layer: int) -> np.ndarray:
        model = self.config.model
        self._layer = layer
        self.channels += np.abs(x).sum(axis=0)
        mixed = own | {"output": np.eye(own["query"].shape[1])}
        heads = super()._attend(x, mixed, layer).reshape(len(x), model.num_heads, -1)
        for head in range(model.num_heads):
            group = head // (model.num_heads // model.num_kv_heads)
            self.groups[layer, group] += sum(math.sqrt((row**2).sum()) for row in heads[:, head])
        return super()._attend(x, own, layer)

    def _mixture(
        self, x: np.ndarray, own: Any, bank: Any, bias: np.ndarray | None, seen: np.ndarray | None
    ) -> np.ndarray:
        self.channels += np.abs(x).sum(axis=0)
        out = super()._mixture(x, own, bank, bias, seen)
        for token, chosen, scores in zip(x, self.experts[-1], self.scores[-1], strict=True):
            for index in chosen:
                gate = token @ bank["gate"][index]
                active = gate / (1 + np.exp(-gate)) * (token @ bank["up"][index])
                self.neurons[self._layer, index] += np.abs(active)
                output = self._post_norm(active @ bank["down"][index], own, "ffn_post_norm")
                self.outputs[self._layer, index] += scores[index] * np.linalg.norm(output)
        return out


def _tokens(*hidden: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    return zip(*(array.reshape(-1, array.shape[-1]) for array in hidden), strict=True)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def merging_costs(
    own: dict[str, np.ndarray], other: dict[str, np.ndarray], inputs: list[np.ndarray], weights: list[np.ndarray]
) -> np.ndarray:
    """C[e, e'] = sum w |E_own,e(x) - E_other,e'(x)|^2 / sum w |E_own,e(x)|^2, pair by pair and input by input."""
    found = np.zeros((len(inputs), len(inputs)))
    for e, (x_e, w_e) in enumerate(zip(inputs, weights, strict=True)):
        for candidate in range(len(inputs)):
            distance = energy = 0.0
            for x, w in zip(x_e, w_e, strict=True):
                output = expert(x[None], own, e)[0]
                distance += w * float(((output - expert(x[None], other, candidate)[0]) ** 2).sum())
                energy += w * float((output**2).sum())
            found[e, candidate] = distance / energy
    return found


def choice_counts(experts: list[np.ndarray], width: int, counted: np.ndarray | None = None) -> np.ndarray:
    """How many of the `counted` tokens went to each of `width` experts, layer by layer."""
    chosen = [e if counted is None else e[counted.reshape(-1) > 0] for e in experts]
    return np.stack([np.bincount(e.reshape(-1), minlength=width) for e in chosen])


def _as_float64(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _as_float64(value) for key, value in tree.items()}
    return np.asarray(tree, np.float64)


def _index(tree: Any, index: int) -> Any:
    if isinstance(tree, dict):
        return {key: _index(value, index) for key, value in tree.items()}
    return tree[index]


def lvps_depths(x: np.ndarray, layers: int, last: int) -> np.ndarray:
    """Depth of each of the numbers `x`, of U(1e-6, 1): the published sampler of Apollo, step by step."""
    ratio = last / layers
    b, e = ratio + 0.4, 0.6
    n = (b * 1e-6 - e) / (e - b)
    y = np.clip(e * (n + 1) / (x + n), 1, ratio)
    return np.floor(y * layers + 1e-9).astype(int)


def lstm(params: dict[str, Any], states: list[int], layers: int) -> float:
    """Logit of one answer from the states of its steps: LSTM layers without peepholes, and a linear output."""

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    inputs = [np.eye(4)[state] for state in states]
    for layer in range(layers):
        cell = params[f"layer_{layer}"]
        hidden = memory = np.zeros(cell["hi"]["bias"].shape)
        outputs = []
        for x in inputs:
            i, f, g, o = (
                x @ cell[f"i{gate}"]["kernel"] + hidden @ cell[f"h{gate}"]["kernel"] + cell[f"h{gate}"]["bias"]
                for gate in "ifgo"
            )
            memory = sigmoid(f) * memory + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(memory)
            outputs.append(hidden)
        inputs = outputs
    return float(inputs[-1] @ params["head"]["kernel"][:, 0] + params["head"]["bias"][0])
