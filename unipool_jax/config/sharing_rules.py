"""Which windows over a bank of experts can be trained."""

from __future__ import annotations

from collections.abc import Iterator

from unipool_jax.config.block_rules import layers_with_experts
from unipool_jax.config.parsing import as_written
from unipool_jax.config.schema import Config


def problems(config: Config) -> Iterator[str]:
    """One message for each reason why layers cannot share experts as `pool.starts` says; none without it."""
    pool, layers = config.pool, config.mixture_layers
    if pool.starts is None:
        for name in ("window", "opening"):
            if (value := getattr(pool, name)) is not None:
                yield f"pool.{name}={as_written(value)}: needs pool.starts; set pool.starts=ring or remove it"
        return
    shown = f"pool.starts={as_written(pool.starts)}"
    if config.moe.router == "none":
        yield f"{shown}: the dense model (moe.router=none) has no experts to see; remove it, or choose a router"
        return
    if pool.groups != 1:
        yield f"pool.groups={pool.groups}: {shown} divides one bank; set pool.groups=1 or remove pool.starts"
        return
    if config.lock.ownership != "none":
        yield (
            f"lock.ownership={config.lock.ownership}: begins with all experts visible to all layers; "
            "remove pool.starts, or set lock.ownership=none"
        )
    if config.mesh.expert_placement == "measured":
        yield f"mesh.expert_placement=measured: windows ({shown}) are evened out by strided; set auto or strided"
    yield from _rule_problems(config, shown) if isinstance(pool.starts, str) else _list_problems(config, shown)
    if isinstance(pool.window, tuple) and len(pool.window) != layers:
        yield (
            f"pool.window={as_written(pool.window)}: has {len(pool.window)} entries for "
            f"{layers_with_experts(config)}; give one number, or one per layer"
        )
        return
    if isinstance(pool.starts, tuple) and (len(pool.starts) != layers or pool.window is None):
        return
    yield from _window_problems(config, shown)
    if pool.opening is not None:
        yield from _opening_problems(config)


def _opening_problems(config: Config) -> Iterator[str]:
    opening, open_at_first, top_k = config.pool.opening, config.moe.experts_per_layer, config.moe.top_k
    assert opening is not None
    if len(opening) != 2 or opening[0] >= opening[1]:
        yield f"pool.opening={as_written(opening)}: must be two rising fractions of train.steps, such as [0.2,0.6]"
    if open_at_first < top_k:
        yield (
            f"pool.opening={as_written(opening)}: opens with moe.experts_per_layer={open_at_first} experts, fewer than "
            f"moe.top_k={top_k}; raise the one or lower the other"
        )


def _rule_problems(config: Config, shown: str) -> Iterator[str]:
    pool, layers, there = config.pool, config.mixture_layers, layers_with_experts(config)
    for name, default in (("experts", None), ("fraction", 1)):
        if (value := getattr(pool, name)) != default:
            yield f"pool.{name}={value}: {shown} says how many experts there are; set moe.experts_per_layer instead"
    if pool.ends and pool.starts in ("ring", "sliding"):
        yield f"pool.ends={pool.ends}: unused with {shown}; set pool.ends=0"
    elif 2 * pool.ends > layers:
        yield f"pool.ends={pool.ends}: both ends have more than {there}; set at most {layers // 2}"
    if pool.span > layers:
        yield f"pool.span={pool.span}: more than {there}; set at most {layers}"


def _list_problems(config: Config, shown: str) -> Iterator[str]:
    assert isinstance(config.pool.starts, tuple)
    starts, layers, total = config.pool.starts, config.mixture_layers, config.total_experts
    if len(starts) != layers:
        yield f"{shown}: has {len(starts)} entries for {layers_with_experts(config)}; give one per layer"
    if config.pool.window is None:
        yield "pool.window=null: a list of pool.starts needs it; set how many experts a layer sees"
    if starts and max(starts) >= total:
        yield f"{shown}: {max(starts)} is beyond the bank of {total} experts; use 0 to {total - 1}, or set pool.experts"


def _window_problems(config: Config, shown: str) -> Iterator[str]:
    windows, top_k = config.windows, config.moe.top_k
    assert windows is not None
    narrow, wide = min(windows.widths), max(windows.widths)
    if narrow < top_k:
        yield f"moe.top_k={top_k}: a layer sees {narrow} experts ({shown}); set at most {narrow}, or widen pool.window"
    if wide > windows.experts:
        # A rule goes beyond its bank only by pool.span, which has been said.
        if config.pool.window is not None:
            yield f"pool.window={wide}: wider than the bank of {windows.experts} experts; set at most {windows.experts}"
        return
    if hidden := [expert for expert, seen in enumerate(windows.exposure()) if not seen]:
        some = ", ".join(map(str, hidden[:8])) + (", ..." if len(hidden) > 8 else "")
        yield (
            f"{shown}: no layer sees {len(hidden)} of the {windows.experts} experts ({some}); widen pool.window, or "
            "choose other starts"
        )


def reuse_problems(config: Config) -> Iterator[str]:
    """Why updates of reused experts cannot be divided as `optimizer.reuse_divisor` says."""
    optimizer = config.optimizer
    if optimizer.reuse_divisor == "none":
        if optimizer.reuse_decay != "scaled":
            yield (
                f"optimizer.reuse_decay={optimizer.reuse_decay}: unused with optimizer.reuse_divisor=none; choose sqrt "
                "or linear, or remove it"
            )
        return
    if any(problems(config)):
        return
    windows = config.windows
    reused = config.layers_per_pool > 1 if windows is None else int(windows.exposure().max()) > 1
    if not reused or config.moe.router == "none" or config.lock.ownership == "random_from_start":
        yield (
            f"optimizer.reuse_divisor={optimizer.reuse_divisor}: no expert is seen by more than one layer; set "
            "optimizer.reuse_divisor=none, or let layers share experts (pool.groups, pool.starts)"
        )
