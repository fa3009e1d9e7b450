"""Comparisons against hand-made runs: grouping, pairs, standard errors, refusals, and the files that come out."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from unipool_jax.analysis.compare import check_slices, compare, families, grouped, load_run, mean_and_error
from unipool_jax.analysis.compare_command import compare_parts, table_of
from unipool_jax.analysis.page import Table
from unipool_jax.analysis.paired import Paired
from unipool_jax.cli.main import execute
from unipool_jax.config.compose import compose_config, save_config
from unipool_jax.config.schema import ConfigError
from unipool_jax.training.run_folder import RunError

STEPS = (20, 40, 60, 80, 100)


def make_run(folder: Path, name: str, losses: list[float], *overrides: str, tokens: int = 1000) -> str:
    """A finished run without checkpoints, with these validation losses at `STEPS`."""
    config = compose_config(["train.steps=100", f"run.name={name}", *overrides])
    path = folder / name
    path.mkdir()
    save_config(config, path / "config.yaml")
    lines = [{"kind": "valid", "step": step, "loss": loss} for step, loss in zip(STEPS, losses, strict=True)]
    lines += [
        {"kind": "train", "step": s, "loss/lm": x, "load/busiest_over_mean": 2.0}
        for s, x in zip(STEPS, losses, strict=True)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {
        "loss": losses[-1],
        "perplexity": math.exp(losses[-1]),
        "bits_per_byte": 1.0,
        "tokens": tokens,
        "bytes": 9,
    }
    summary = {"step": STEPS[-1], "tokens": 100, "results": {"valid": result, "test": result}, "unigram": None}
    summary |= {"tokens_per_second": None, "experts_used": 8, "experts_total": 8, "busiest_over_mean": 1.5}
    (path / "summary.json").write_text(json.dumps(summary))
    return str(path)


@pytest.fixture
def sweep(tmp_path: Path) -> list[str]:
    """Two methods and a smaller pool, seeds 1 to 3; the small pool has seed 1 only."""
    folders = []
    for seed, base in ((1, 5.0), (2, 6.0), (3, 5.5)):
        vanilla = [base + 3, base + 2, base + 1, base + 0.5, base]
        gap = {1: 0.1, 2: 0.2, 3: 0.6}[seed]
        ours = [loss - 0.4 for loss in vanilla[:-1]] + [base - gap]
        folders.append(make_run(tmp_path, f"v{seed}", vanilla, "method=vanilla", f"train.seed={seed}"))
        folders.append(make_run(tmp_path, f"u{seed}", ours, f"train.seed={seed}"))
    small = [5.0] * 5
    folders.append(make_run(tmp_path, "small", small, "pool.fraction=0.5", "train.seed=1"))
    return folders


def test_pairs_and_standard_errors_by_hand(sweep: list[str]) -> None:
    groups = grouped([load_run(folder) for folder in sweep])
    assert [(group.name, sorted(group.runs)) for group in groups] == [
        ("vanilla", [1, 2, 3]),
        ("unipool fraction=1", [1, 2, 3]),
        ("unipool fraction=0.5", [1]),
    ]
    vanilla, ours, small = compare(groups, groups[0])
    assert vanilla.loss.mean == pytest.approx(5.5)
    assert vanilla.loss.standard_error == pytest.approx(0.5 / math.sqrt(3))
    assert (vanilla.difference, vanilla.baseline) == (None, None)
    assert ours.difference is not None
    assert ours.late is not None
    # Differences -0.1, -0.2, -0.6: mean -0.3; squares of deviations 0.04, 0.01, 0.09 over 2; s = sqrt(0.07).
    assert ours.difference.mean == pytest.approx(-0.3)
    assert ours.difference.standard_error == pytest.approx(math.sqrt(0.07 / 3))
    # Student's t with 2 degrees of freedom: 4.3027 standard errors to each side.
    assert ours.difference.interval == pytest.approx((-0.3 - 4.30265 * 0.152753, -0.3 + 4.30265 * 0.152753), rel=1e-4)
    assert ours.difference.reading == "not shown: the interval holds 0"
    # Late: evaluations after step 60 differ by -0.4 and by the final gap: -0.25, -0.3, -0.5, mean -0.35.
    assert ours.late.mean == pytest.approx(-0.35)
    assert ours.late.standard_error == pytest.approx(math.sqrt((0.1**2 + 0.05**2 + 0.15**2) / 2 / 3))
    # Paired, the error is much smaller than that of the losses themselves, whose seeds differ more than the methods.
    assert small.difference is not None
    assert small.difference == Paired(0.0, 1)
    assert small.difference.reading == "not shown: 1 of at least 3 pairs"


def test_one_value_has_no_error() -> None:
    assert mean_and_error([2.0]) == (2.0, None)
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)


def test_a_common_level_of_a_seed_cancels(tmp_path: Path) -> None:
    folders = []
    for seed in (1, 2):
        level = 100.0 * seed
        folders.append(make_run(tmp_path, f"v{seed}", [level] * 5, "method=vanilla", f"train.seed={seed}"))
        folders.append(make_run(tmp_path, f"u{seed}", [level - 0.25] * 5, f"train.seed={seed}"))
    groups = grouped([load_run(folder) for folder in folders])
    difference = compare(groups, groups[0])[1].difference
    assert difference is not None
    assert (difference.mean, difference.standard_error, difference.interval) == (-0.25, 0.0, (-0.25, -0.25))
    assert difference.reading == "not shown: 2 of at least 3 pairs"


def test_no_common_seed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        make_run(tmp_path, "v1", [5.0] * 5, "method=vanilla", "train.seed=1"),
        make_run(tmp_path, "u2", [4.0] * 5, "train.seed=2"),
    ]
    assert execute(["compare", *folders, f"out={tmp_path / 'out'}"]) == 0
    assert "not shown: no seed in common" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.split=[8,1,1]", "data.split"),
        ("data.split_order=contiguous", "data.split_order"),
        ("data.sequence_length=128", "data.sequence_length"),
        ("data.tokenizer=bytes", "data.tokenizer"),
        ("train.eval_batches=2", "train.eval_batches x train.batch_size"),
        ("train.eval_slice=moving", "train.eval_slice"),
    ],
)
def test_different_validation_text_is_refused(tmp_path: Path, override: str, named: str) -> None:
    folders = [make_run(tmp_path, "a", [5.0] * 5, "method=vanilla"), make_run(tmp_path, "b", [5.0] * 5, override)]
    with pytest.raises(RunError) as error:
        execute(["compare", *folders])
    assert named in str(error.value)
    assert folders[0] in str(error.value)
    assert folders[1] in str(error.value)


def test_the_same_slice_in_other_words_is_accepted(tmp_path: Path) -> None:
    same = ["train.eval_batches=4", "train.batch_size=16"], ["train.eval_batches=2", "train.batch_size=32"]
    a, b = (make_run(tmp_path, f"r{i}", [5.0] * 5, *words) for i, words in enumerate(same))
    check_slices([load_run(a), load_run(b)])


def test_files_that_changed_are_noticed(tmp_path: Path) -> None:
    a = make_run(tmp_path, "a", [5.0] * 5, "method=vanilla")
    b = make_run(tmp_path, "b", [5.0] * 5, tokens=1001)
    with pytest.raises(RunError, match=r"1000 valid tokens in .*1001"):
        check_slices([load_run(a), load_run(b)])


def with_text(folder: str, fingerprint: str, evaluated: str = "1") -> str:
    """The run with this identity of its text."""
    path = Path(folder) / "summary.json"
    summary = json.loads(path.read_text())
    entry = {"name": "a.txt", "path": "store", "fingerprint": fingerprint, "documents": 9, "tokens": 1000}
    summary["text"] = {"fingerprint": fingerprint, "tokenizer_sha256": "t", "texts": [entry]}
    summary["results"]["valid"]["text"] = evaluated
    path.write_text(json.dumps(summary))
    return folder


def test_text_is_compared_by_fingerprint_where_runs_know_it(tmp_path: Path) -> None:
    """Equal paths and counts of tokens may hide other text; equal text may lie elsewhere."""

    def run(name: str, *words: str) -> str:
        return make_run(tmp_path, name, [5.0] * 5, "data=text", "data.tokenizer=demo", *words)

    first = with_text(run("a", "data.files=[a.txt]", "method=vanilla"), "f1")
    edited = with_text(run("b", "data.files=[a.txt]"), "f2")
    moved = with_text(run("c", "data.files=[b.txt]"), "f1")
    part = with_text(run("d", "data.files=[a.txt]"), "f1", evaluated="2")
    unknown = run("e", "data.files=[b.txt]")
    with pytest.raises(RunError, match=r"a\.txt: fingerprint f1 \(9 documents, 1,000 tokens\) there, fingerprint f2"):
        execute(["compare", first, edited])
    with pytest.raises(RunError, match=r"valid text: 1 in .*a, 2 in .*d"):
        execute(["compare", first, part])
    with pytest.raises(RunError, match=r"data\.files"):
        execute(["compare", first, unknown])
    assert execute(["compare", first, moved]) == 0


def test_what_cannot_be_compared_is_refused(sweep: list[str], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"same settings and train\.seed=1"):
        grouped(
            [
                load_run(folder)
                for folder in [sweep[0], make_run(tmp_path, "w", [5.0] * 5, "method=vanilla", "train.seed=1")]
            ]
        )
    unfinished = Path(sweep[0]) / "summary.json"
    unfinished.unlink()
    with pytest.raises(RunError, match=r"v1: no summary\.json, so the run has not finished"):
        execute(["compare", *sweep])
    for arguments, named in (
        ([sweep[1]], "two or more"),
        ([*sweep[1:3], "baselin=x"], "baselin=x"),
        ([*sweep[1:3], "baseline=dense"], "'vanilla'"),
    ):
        with pytest.raises(ConfigError, match=named):
            execute(["compare", *arguments])


def test_names_tell_groups_apart(tmp_path: Path) -> None:
    words = [["pool.groups=2"], ["loss.pool_coefficient=0.1", "pool.groups=2"], ["method=dense"], ["method=vanilla"]]
    runs = [load_run(make_run(tmp_path, f"r{i}", [5.0] * 5, *w)) for i, w in enumerate(words)]
    assert [group.name for group in grouped(runs)] == [
        "unipool pool_coefficient=0.001",
        "unipool pool_coefficient=0.1",
        "dense",
        "vanilla",
    ]
    other = load_run(make_run(tmp_path, "other", [5.0] * 5, "scale_name=wide", "model.ffn_size=512"))
    names = [group.name for group in grouped([*runs, other])]
    assert names[-1] == "wide unipool"
    assert len(set(names)) == len(names)


def test_sweeps_are_found(tmp_path: Path) -> None:
    words = {
        "vanilla": ["method=vanilla"],
        "fine": ["method=vanilla", "moe.experts_per_layer=16", "moe.top_k=2"],
        "full": [],
        "half": ["pool.fraction=0.5"],
        "third": ["pool.experts=16"],
        "finer": ["moe.experts_per_layer=16", "moe.top_k=2"],
    }
    runs = [load_run(make_run(tmp_path, name, [5.0] * 5, *w)) for name, w in words.items()]
    groups = grouped(runs)
    sizes = families(groups, {"pool.experts", "pool.fraction"})
    assert [group.name for group in sizes[2]] == ["unipool", "unipool fraction=0.5", "unipool experts=16"]
    titles = [part.title for part in compare_parts(compare(groups, groups[0]), groups[0])]
    assert titles == [
        "Results",
        "Differences",
        "Over training",
        "Balance over training",
        "Smaller pools",
        "Granularity",
    ]


def test_every_scale_and_granularity_has_its_own_baseline(tmp_path: Path) -> None:
    def at(loss: float, name: str, *words: str) -> str:
        return make_run(tmp_path, name, [loss] * 5, *words)

    wide, fine = ["scale_name=wide", "model.ffn_size=512"], ["moe.experts_per_layer=16", "moe.top_k=2"]
    folders = [
        at(5.0, "v", "method=vanilla"),
        at(4.9, "u"),
        at(4.0, "vw", "method=vanilla", *wide),
        at(3.8, "uw", *wide),
        at(3.0, "vf", "method=vanilla", *fine),
        at(2.7, "uf", *fine),
        at(2.6, "uwf", *wide, *fine),
        at(6.0, "d", "method=dense"),
    ]
    groups = grouped([load_run(folder) for folder in folders])
    rows = compare(groups, groups[0])
    found = {next(iter(r.group.runs.values())).folder.name: r.difference and r.difference.mean for r in rows}
    # No baseline is both wide and fine, so that pool has the wide one; the dense model has that of its scale.
    expected = {"v": None, "u": -0.1, "vw": None, "uw": -0.2, "vf": None, "uf": -0.3, "uwf": -1.4, "d": 1.0}
    assert found == {name: value if value is None else pytest.approx(value) for name, value in expected.items()}


class References(HTMLParser):
    """Collects what a page refers to, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "img", "source", "link", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.images += tag == "img"
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(path: Path) -> References:
    """The page is well formed, has no script and refers to nothing outside itself."""
    text = path.read_text(encoding="utf-8")
    page = References()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.found
    assert all(reference.startswith("data:image/png;base64,") for reference in page.found)
    for forbidden in ("http:", "https:", "//", "<script", "@import", "url("):
        assert forbidden not in text.replace("data:image/png;base64,", "").split("<body>")[0]
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text
    return page


def test_tokens_without_an_expert_have_a_column_where_there_are_any(tmp_path: Path) -> None:
    old, vanilla, ours = (
        make_run(tmp_path, name, [3.0] * 5, f"method={method}", f"train.seed={seed}")
        for name, method, seed in (("old", "unipool", 1), ("vanilla", "vanilla", 2), ("ours", "unipool", 2))
    )

    def table() -> Table:
        groups = grouped([load_run(folder) for folder in (old, vanilla, ours)])
        return table_of(compare(groups, groups[0]))

    for folder, shares in ((vanilla, [0.0, 0.0]), (ours, [0.0, 0.0])):
        with Path(folder, "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps({"kind": "valid", "step": 100, "loss": 3.0, "routing/zero_gates": shares}) + "\n")
    assert "no expert" not in table().head
    with Path(ours, "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"kind": "valid", "step": 100, "loss": 3.0, "routing/zero_gates": [0.1, 0.5]}) + "\n")
    found = table()
    assert found.head[-1] == "no expert"
    # The run of an earlier version, of one group with ours, does not know.
    assert [row[-1] for row in found.rows] == ["30.0%", "0.0%"]
    assert load_run(old).zero_gates is None


def test_flops_have_a_column_where_a_run_grows(tmp_path: Path) -> None:
    grows = ("growth.layers=[2,6]", "growth.ends=[.5,1]")
    whole, grown = (make_run(tmp_path, name, [3.0] * 5, *words) for name, words in (("a", ()), ("b", grows)))
    groups = grouped([load_run(folder) for folder in (whole, grown)])
    assert [row[-1] for row in table_of(compare(groups, groups[0])).rows] == ["-", "-"]
    for folder, flops in ((whole, 2e15), (grown, 1.234e15)):
        path = Path(folder, "summary.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"flops": flops}))
    groups = grouped([load_run(folder) for folder in (whole, grown)])
    found = table_of(compare(groups, groups[0]))
    assert (found.head[-1], [row[-1] for row in found.rows]) == ("FLOPs", ["2e+15", "1.23e+15"])
    groups = grouped([load_run(whole)])
    assert "FLOPs" not in table_of(compare(groups, groups[0])).head


def test_maps_under_unequal_pressure_are_told(tmp_path: Path) -> None:
    """A set of layers weighs as much as any other, so six pools push each layer six times as hard as one."""

    def words(*settings: str) -> str:
        folders = [
            make_run(tmp_path, f"{len(list(tmp_path.iterdir()))}", [3.0] * 5, "scale=182m", *each.split())
            for each in settings
        ]
        groups = grouped([load_run(folder) for folder in folders])
        return " ".join(compare_parts(compare(groups, groups[0]), groups[0])[0].words)

    # Over twelve layers, once and six times.
    assert "(ring 0.08, unipool 0.50)" in words("method=ring", "method=unipool pool.groups=6")
    assert "unequal" not in words("method=ring", "method=unipool loss.pool_coefficient=1e-3", "method=vanilla")
    even = "loss.pressure=layer"
    assert "unequal" not in words(f"method=ring {even}", f"method=unipool pool.groups=6 {even}")


def test_the_command_writes_table_figures_and_page(
    sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert execute(["compare", *sweep, f"out={out}"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "compare.json",
        "curves.png",
        "load.png",
        "pool_fraction.png",
        "report.html",
        "table.md",
    ]
    assert check_page(out / "report.html").images == 3
    rows = (out / "table.md").read_text().splitlines()
    assert rows[3].startswith("| unipool fraction=1 | 3 | 5.2000 ± ")
    # With 2 degrees of freedom, p of |t| is 1 - t / sqrt(2 + t^2): t is 0.3 / 0.1528, then 0.35 / 0.0764.
    assert rows[6:] == [
        "|  | minus | of | pairs | difference | 95% interval | p | reading |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| unipool fraction=1 | vanilla | last evaluation | 3 | -0.3000 | -0.9572 to +0.3572 | 0.19 | "
        "not shown: the interval holds 0 |",
        "| unipool fraction=1 | vanilla | late training | 3 | -0.3500 | -0.6786 to -0.0214 | 0.044 | shown |",
        "| unipool fraction=0.5 | vanilla | last evaluation | 1 | +0.0000 | - | - | not shown: 1 of at least 3 pairs |",
        "| unipool fraction=0.5 | vanilla | late training | 1 | -0.2500 | - | - | not shown: 1 of at least 3 pairs |",
    ]
    printed = capsys.readouterr().out
    for cell in ("95% interval", "-0.6786 to -0.0214", "0.044", "not shown: the interval holds 0"):
        assert cell in printed
        assert cell in (out / "report.html").read_text()
    document = json.loads((out / "compare.json").read_text())
    assert document["baseline"] == "vanilla"
    ours, small = document["groups"][1:]
    assert ours["valid_loss_by_seed"] == {"1": 4.9, "2": 5.8, "3": 4.9}
    assert ours["late_difference"]["interval"] == pytest.approx([-0.6786, -0.0214], abs=1e-4)
    assert (ours["late_difference"]["shown"], ours["difference"]["shown"]) == (True, False)
    assert small["difference"] == {
        "mean": 0.0,
        "pairs": 1,
        "standard_error": None,
        "interval": None,
        "p": None,
        "shown": False,
        "reading": "not shown: 1 of at least 3 pairs",
    }


def test_the_results_of_a_comparison_are_not_taken_for_runs(
    sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are among runs/*: in a folder, or with out=runs as files."""
    out = tmp_path / "out"
    words = ["compare", *sweep[:2], str(out), str(out / "compare.json"), f"out={out}"]
    assert execute(["compare", *sweep[:2], f"out={out}"]) == 0
    capsys.readouterr()
    assert execute(words) == 0
    said = capsys.readouterr().out
    assert f"{out}: results of an earlier comparison, left out" in said
    assert f"{out / 'compare.json'}: a file and no run, left out" in said
    with pytest.raises(ConfigError, match=r"1 run folder\(s\) given: a comparison needs two or more"):
        execute(["compare", sweep[0], str(out)])
