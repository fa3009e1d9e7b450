"""Every published row is one command line, and a configuration survives the way to a file and back."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from tiny import METHODS
from unipool_jax.config.compose import (
    CONFIG_DIR,
    compose_config,
    differences,
    load_config,
    overrides_from,
    save_config,
)
from unipool_jax.config.files import FileError
from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.rules import problems, validate
from unipool_jax.config.schema import Config, ConfigError, settings, to_mapping

SCALES = ("182m", "469m", "650m", "830m", "978m")


def composed(line: str) -> Config:
    """The valid configuration of one command line; no data is needed to look at it."""
    config = compose_config([*line.split(), "mode=describe"])
    validate(config)
    return config


def parameter_count(config: Config) -> int:
    """Parameters by the closed form that reproduces the published totals."""
    m = config.model
    width, layers = m.hidden_size, m.num_layers
    attention = 2 * width**2 + 2 * width * m.num_kv_heads * config.head_size
    experts = 3 * width * m.ffn_size * config.total_experts
    routers = 0 if config.moe.router == "none" else layers * config.experts_per_pool * width
    scales = layers if config.moe.router == "norm" else 0
    return 2 * m.vocab_size * width + layers * attention + experts + routers + (2 * layers + 1) * width + scales


def test_no_argument_is_the_demo() -> None:
    config = compose_config([])
    validate(config)
    assert (config.scale_name, config.method_name, config.data.source, config.mode) == (
        "demo", "unipool", "demo", "train",
    )  # fmt: skip
    assert (config.data.split, config.data.split_order) == ((18, 1, 1), "interleaved")


# arXiv 2605.06665: shapes from table 8, totals by the closed form, which agree with the printed ones after rounding.
@pytest.mark.parametrize(
    (
        "scale", "layers", "width", "heads", "head_size", "ffn", "experts", "coefficient", "remat",
        "unipool", "vanilla", "dense",
    ),
    [
        ("182m", 12, 768, 12, 64, 3072, 96, 1e-2, "moe", 777_898_764, 777_087_744, 182_471_424),
        ("469m", 24, 1024, 16, 64, 4096, 192, 2e-2, "full", 2_588_460_056, 2_583_938_048, 469_812_224),
        ("650m", 36, 1024, 16, 64, 4096, 288, 2e-2, "full", 3_833_799_716, 3_823_477_760, 652_289_024),
        ("830m", 48, 1024, 16, 64, 4096, 384, 2e-2, "full", 5_081_498_672, 5_063_017_472, 834_765_824),
        ("978m", 24, 1536, 16, 96, 6144, 192, 2e-2, "full", 5_741_815_320, 5_735_032_320, 978_396_672),
    ],
)  # fmt: skip
def test_published_scales(
    scale: str, layers: int, width: int, heads: int, head_size: int, ffn: int, experts: int, coefficient: float,
    remat: str, unipool: int, vanilla: int, dense: int,
) -> None:  # fmt: skip
    config = composed(f"scale={scale}")
    m = config.model
    assert (m.num_layers, m.hidden_size, m.num_heads, m.num_kv_heads, m.ffn_size) == (layers, width, heads, 4, ffn)
    assert (config.head_size, m.vocab_size, config.data.sequence_length) == (head_size, 51200, 1024)
    assert (m.compute_dtype, m.remat, config.loss.pool_coefficient) == ("bfloat16", remat, coefficient)
    assert (config.total_experts, config.pool.groups, config.layers_per_pool) == (experts, 1, layers)
    assert (config.train.steps, config.tokens_per_step, config.train.seed) == (60_000, 524_288, 1234)
    assert (config.data.source, config.data.tokenizer, config.data.split) == ("stores", "gpt2", (969, 30, 1))
    assert parameter_count(config) == unipool
    assert parameter_count(composed(f"scale={scale} method=vanilla")) == vanilla
    assert parameter_count(composed(f"scale={scale} method=dense")) == dense


@pytest.mark.parametrize(
    ("method", "router", "groups", "experts", "balance"),
    [
        ("dense", "none", 12, 12, "none"),
        ("vanilla", "softmax", 12, 96, "switch"),
        ("vanilla_normrouter", "norm", 12, 96, "switch"),
        ("vanilla_aux_free", "sigmoid", 12, 96, "expert_bias"),
        ("shared_layer_aux", "softmax", 1, 96, "switch"),
        ("shared_pool_aux", "softmax", 1, 96, "pool"),
        ("unipool", "norm", 1, 96, "pool"),
    ],
)
def test_ablations_at_182m(method: str, router: str, groups: int, experts: int, balance: str) -> None:
    config = composed(f"scale=182m method={method}")
    assert (config.method_name, config.moe.router, config.loss.balance) == (method, router, balance)
    assert (config.pool.groups, config.total_experts, config.moe.top_k) == (groups, experts, 1)
    assert (config.loss.switch_coefficient, config.loss.pool_coefficient) == (1e-2, 1e-2)
    assert config.loss.expert_bias_rate == 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", ["demo", *SCALES])
def test_every_method_runs_at_every_scale(scale: str, method: str) -> None:
    config = composed(f"scale={scale} method={method}")
    assert (config.scale_name, config.method_name) == (scale, method)


@pytest.mark.parametrize(
    ("line", "experts", "groups", "per_pool", "top_k"),
    [
        ("scale=182m pool.groups=12", 96, 12, 8, 1),  # grouped sharing
        ("scale=182m pool.groups=6", 96, 6, 16, 1),
        ("scale=182m pool.groups=4", 96, 4, 24, 1),
        ("scale=182m pool.groups=2", 96, 2, 48, 1),
        ("scale=182m pool.fraction=0.667", 64, 1, 64, 1),  # reduced pools
        ("scale=182m pool.fraction=0.5", 48, 1, 48, 1),
        ("scale=182m pool.experts=48", 48, 1, 48, 1),
        ("scale=469m pool.fraction=0.667", 128, 1, 128, 1),
        ("scale=469m pool.fraction=0.5", 96, 1, 96, 1),
        ("scale=469m pool.fraction=0.333", 64, 1, 64, 1),
        ("scale=650m pool.fraction=0.5", 144, 1, 144, 1),
        ("scale=650m pool.fraction=0.444", 128, 1, 128, 1),
        ("scale=650m pool.fraction=0.333", 96, 1, 96, 1),
        ("scale=830m pool.fraction=0.416", 160, 1, 160, 1),
        ("scale=830m pool.fraction=0.333", 128, 1, 128, 1),
        ("scale=182m moe.experts_per_layer=16 moe.top_k=2", 192, 1, 192, 2),  # granularity
        ("scale=182m moe.experts_per_layer=32 moe.top_k=4", 384, 1, 384, 4),
        ("scale=182m method=vanilla moe.experts_per_layer=16 moe.top_k=2", 192, 12, 16, 2),
        ("scale=182m method=vanilla moe.experts_per_layer=32 moe.top_k=4", 384, 12, 32, 4),
    ],
)
def test_published_pools(line: str, experts: int, groups: int, per_pool: int, top_k: int) -> None:
    config = composed(line)
    assert (config.total_experts, config.pool.groups, config.experts_per_pool, config.moe.top_k) == (
        experts, groups, per_pool, top_k,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "stored"),
    [
        ("scale=182m pool.experts=64", 551.1e6),
        ("scale=182m pool.experts=48", 437.7e6),
        ("scale=469m pool.experts=128", 1.782e9),
        ("scale=650m pool.experts=144", 2.017e9),
        ("scale=830m pool.experts=160", 2.252e9),
        ("scale=182m moe.experts_per_layer=16 moe.top_k=2", 1.458e9),
        ("scale=182m moe.experts_per_layer=32 moe.top_k=4", 2.819e9),
    ],
)
def test_published_stored_parameters(line: str, stored: float) -> None:
    assert parameter_count(composed(line)) == pytest.approx(stored, rel=3e-4)


def test_published_scale_chooses_its_data_and_the_command_line_wins() -> None:
    assert composed("scale=182m").data.source == "stores"
    for line in ("scale=182m data=text", "data=text scale=182m"):
        assert composed(line).data.source == "files"
    assert composed("scale=182m data=demo").data.tokenizer == "demo"
    assert composed("scale=182m data=demo").data.sequence_length == 1024


def test_depth_changes_the_groups_of_the_ordinary_mixture() -> None:
    config = composed("method=vanilla model.num_layers=4")
    assert (config.pool.groups, config.total_experts) == (4, 32)


def test_every_setting_can_be_overridden_without_a_plus() -> None:
    values = settings(compose_config([]))
    overrides = [f"{name}={'null' if value is None else list(value) if isinstance(value, tuple) else value}"
                 for name, value in values.items()]  # fmt: skip
    assert settings(compose_config(overrides)) == values


def test_unknown_settings_are_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(["model.num_layrs=3", "colour=red", "scale=182m"])
    assert len(caught.value.problems) == 2
    assert "model.num_layrs" in caught.value.problems[0]
    assert "model.num_layers" in caught.value.problems[0]
    assert "colour" in caught.value.problems[1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+model.width=3", "model.width"),
        ("model={width: 3}", "model: a section"),
        ("model=3", "model=3"),
        ("data=piles", "demo, pile, text"),
        ("scale=3", "scale=3: no such choice; choose one of 182m"),
        ("run.name=a=b", "run.name=a=b: "),
        ("=3", "'=3': no setting named"),
        ("+=", "'+=': no setting named"),
        ("model.num_layers", "model.num_layers"),
        ("pool.groups=${nothing}", "pool.groups"),
        ("train.steps=1,2", "train.steps"),
        ("train.steps=1e3", "train.steps=1000"),
        ("train.steps=true", "train.steps=True: expected a whole number"),
        ("train.seed=null", "train.seed=null"),
        ("optimizer.beta1=high", "optimizer.beta1='high'"),
        ("data.files=[7]", "data.files[0]=7: expected text"),
        ("run.tensorboard=1", "run.tensorboard=1: expected true or false"),
        ("moe.router=topk", "none, softmax, sigmoid, norm"),
        ("moe.router=[norm]", "moe.router"),
        ("data.split=[1,x,1]", "data.split[1]"),
    ],
)
def test_bad_overrides_are_configuration_errors(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config([override])
    assert words in str(caught.value)
    assert "\n" not in caught.value.problems[0]


def test_wrong_types_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(["model.num_layers=3.5", "train.steps=many", "moe.router=topk"])
    assert [problem.partition("=")[0] for problem in caught.value.problems] == [
        "model.num_layers", "moe.router", "train.steps",
    ]  # fmt: skip


def test_composing_leaves_a_surrounding_hydra_alone() -> None:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        surrounding = GlobalHydra.instance().hydra
        compose_config(["scale=182m"])
        assert GlobalHydra.instance().hydra is surrounding


def test_configuration_files_hold_known_settings_and_say_what_they_are() -> None:
    names = set(settings(Config()))
    for path in sorted(CONFIG_DIR.glob("*/*.yaml")):
        lines = path.read_text().splitlines()
        assert lines[0] == "# @package _global_", path
        assert lines[1].startswith("# "), path
        node = OmegaConf.load(path)
        assert isinstance(node, DictConfig)
        node.pop("defaults", None)
        for section, value in node.items():
            keys = (
                [f"{section!s}.{key}" for key in map(str, value)] if isinstance(value, DictConfig) else [str(section)]
            )
            assert set(keys) <= names, path


def test_every_setting_has_a_docstring() -> None:
    source = (Path(__file__).parent.parent / "unipool_jax" / "config" / "schema.py").read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    sections: list[type] = [Config, *(type(getattr(Config(), entry.name)) for entry in dataclasses.fields(Config))]
    for section in (kind.__name__ for kind in sections if dataclasses.is_dataclass(kind)):
        body = classes[section].body
        for entry, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(entry, ast.AnnAssign) and not ast.unparse(entry.annotation).endswith("Config"):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{section}.{ast.unparse(entry.target)}"


def test_file_round_trip(tmp_path: Path) -> None:
    config = compose_config(["scale=182m", "run.name='7'", "data.stores=[a,'b c']", "optimizer.min_learning_rate=1e-7"])
    path = tmp_path / "config.yaml"
    save_config(Config(), path)
    save_config(config, path)
    assert load_config(path) == config
    assert list(tmp_path.iterdir()) == [path]
    assert from_mapping(to_mapping(config)) == config


def test_a_failed_write_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    save_config(Config(), path)

    def fail(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(FileError, match="disk full"):
        save_config(compose_config([]), path)
    assert load_config(path) == Config()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not YAML"),
        ("- 1", "found list"),
        ("model: {num_layrs: 3}", "model.num_layrs"),
        ("model: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises((ConfigError, FileError)) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_a_file_with_the_old_name_of_the_capacity_factor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("mesh:\n  receive_factor: 2.5\n", encoding="utf-8")
    assert load_config(path).mesh.capacity_factor == 2.5


def test_a_file_written_by_hand_may_leave_settings_out(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"num_layers": 4}}))
    assert differences(load_config(path), Config()) == ["model.num_layers"]


@pytest.mark.parametrize("text", ["a b", "it's", "back\\", "\\' $x", "null", "1e3", "", "[a,b]", "k=v", "a,b", "mine"])
def test_overrides_make_one_configuration_of_another(text: str) -> None:
    more = ["pool.experts=48", "train.eval_batches=null", "run.tensorboard=false", "optimizer.learning_rate=1e-5"]
    wanted = compose_config(more)
    wanted = dataclasses.replace(
        wanted,
        run=dataclasses.replace(wanted.run, name=text),
        data=dataclasses.replace(wanted.data, files=(text, "b.txt")),
    )
    assert compose_config(overrides_from(compose_config(), wanted)) == wanted


def test_differences_names_settings_in_schema_order() -> None:
    a, b = compose_config([]), compose_config(["run.name=x", "train.steps=7", "model.num_layers=2"])
    assert differences(a, b) == ["model.num_layers", "train.steps", "run.name"]
    assert differences(a, a) == []


def test_derived_numbers() -> None:
    config = dataclasses.replace(
        compose_config(["pool.groups=3", "train.batch_size=48", "train.microbatch_size=16"]), mode="describe"
    )
    assert problems(config) == []
    assert (config.layers_per_pool, config.experts_per_pool, config.num_microbatches) == (2, 16, 3)
    assert config.tokens_per_step == 48 * config.data.sequence_length


def test_one_file_needs_no_brackets() -> None:
    assert compose_config(["data=text", "data.files=book.txt"]).data.files == ("book.txt",)
    assert compose_config(["data=text", "data.files=[book.txt,other.txt]"]).data.files == ("book.txt", "other.txt")
