"""Bad input is refused before anything starts, with all problems at once. Accepted input is consistent."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import load_manifest
from moe_dist.plan.preflight import Preflight, check, check_file, layout_without_data, token_mix
from tests.support.messages import refused
from tests.support.tiny import tiny_config, tiny_dataset, write_config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny_dataset(data := tmp_path_factory.mktemp("data") / "data")
    return data


class Site:
    """A configuration and a data set, which a test may break."""

    def __init__(self, root: Path, made: Path) -> None:
        self.data = root / "data"
        shutil.copytree(made, self.data)
        self.config = write_config(tiny_config(self.data, root / "runs"), root / "run.yaml")

    def check(self, *overrides: str, **options: Any) -> Preflight:
        return check_file(self.config, overrides, **options)

    def problems(self, *overrides: str, error: type[ConfigError | DataError] = ConfigError, **options: Any) -> str:
        """Returns the error's text. The error must have exactly this class."""
        with pytest.raises((ConfigError, DataError)) as raised:
            self.check(*overrides, **options)
        assert type(raised.value) is error, raised.value
        assert "see docs/" in str(raised.value)
        return str(raised.value)

    def edit_manifest(self, change: Callable[[dict[str, Any]], None]) -> None:
        path = self.data / "manifest.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))


@pytest.fixture
def site(tmp_path: Path, made: Path) -> Site:
    return Site(tmp_path, made)


def test_what_passes_fits_together(site: Site) -> None:
    plan = site.check()
    manifest = load_manifest(site.data)
    assert plan.manifest == manifest
    assert [group.name for group in plan.groups] == ["text", "image"]
    assert plan.placement.slots == ((0, 1, 2), (3, 4))
    counts = [source.train.tokens_by_modality for source in manifest.sources.values()]
    assert plan.token_mix == {name: sum(each.get(name, 0) for each in counts) for name in manifest.modalities}
    assert [each.name for each in plan.comparison.plans] == ["pinned", "interleaved"]
    assert check(plan.config, manifest=manifest) == plan
    assert check(plan.config, world_size=2) == plan


def test_weights_change_the_mix(site: Site) -> None:
    config = load_config(site.config, ["data.weights={prose: 3, captions: 1}"])
    manifest = load_manifest(site.data)
    mix = token_mix(config, manifest)
    pictures = manifest.sources["captions"].train
    share = pictures.tokens_by_modality["image"] / pictures.tokens / 4
    assert mix["image"] / sum(mix.values()) == pytest.approx(share, rel=1e-4)


def test_a_mix_that_the_manifest_leaves_out_is_counted(site: Site) -> None:
    before = site.check().token_mix

    def forget(values: dict[str, Any]) -> None:
        for source in values["sources"].values():
            del source["train"]["tokens_by_modality"]

    site.edit_manifest(forget)
    assert site.check().token_mix == before


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ["parallel.edp=512", "train.global_batch=2048"],
            "parallel.ep x parallel.edp = 1024 ranks, but the data has only 192 training documents",
        ),
        (["model.moe.groups.image.modalities=[picture]"], "no group routes the data's modality 'image'"),
        (["data.path=/nowhere"], "moe-dist prepare-data --out /nowhere"),
    ],
)
def test_configurations_that_do_not_fit_the_data(site: Site, overrides: list[str], fault: str) -> None:
    assert fault in site.problems(*overrides)


def test_other_numbers_of_ranks_than_configured(site: Site) -> None:
    assert "3 ranks were started, but parallel.ep=2 x parallel.edp=1 = 2" in site.problems(world_size=3)


def cut(name: str, count: int) -> Callable[[Site], None]:
    def damage(site: Site) -> None:
        path = site.data / name
        path.write_bytes(path.read_bytes()[:-count])

    return damage


def remove(name: str) -> Callable[[Site], None]:
    return lambda site: (site.data / name).unlink()


def edit(*path: str, value: Any) -> Callable[[Site], None]:
    def change(values: dict[str, Any]) -> None:
        *above, last = path
        for key in above:
            values = values[key]
        values[last] = value

    return lambda site: site.edit_manifest(change)


def put_large_id(site: Site) -> None:
    ids = np.fromfile(site.data / "prose_train.bin", np.uint16)
    ids[-1] = 64
    ids.tofile(site.data / "prose_train.bin")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (cut("captions_train.bin", 2), "captions_train.bin: 4030 bytes, but its .idx says 2016 tokens"),
        (cut("captions_valid.idx", 1), "cut short or damaged"),
        (cut("captions_valid.idx", 700), "cut short"),
        (remove("prose_train.bin"), "prose_train.bin: missing"),
        (remove("prose_valid.idx"), "prose_valid.idx: missing"),
        (remove("captions_train.filler"), "captions_train.filler"),
        (cut("captions_train.filler", 1), "captions_train.filler"),
        (edit("sources", "prose", "train", "documents", value=97), "has 96 documents, but its manifest says 97"),
        (edit("sources", "prose", "valid", "tokens_by_modality", value={}), None),
        (put_large_id, "prose_train.bin holds the id 64, but the manifest's vocab_size=64"),
        (edit("tokenizer", value="tokenizer.json"), "tokenizer.json is missing"),
    ],
)  # fmt: skip
def test_bad_data(site: Site, damage: Callable[[Site], None], fault: str | None) -> None:
    damage(site)
    if fault is None:
        site.check()
    else:
        assert fault in site.problems(error=DataError)


def test_tokens_that_disagree_with_the_index(site: Site) -> None:
    def change(values: dict[str, Any]) -> None:
        split = values["sources"]["prose"]["train"]
        split["tokens"] += 1
        split["tokens_by_modality"]["text"] += 1

    site.edit_manifest(change)
    assert "tokens, but its manifest says" in site.problems(error=DataError)


def test_everything_at_once(site: Site) -> None:
    cut("captions_train.bin", 2)(site)
    remove("prose_valid.idx")(site)
    edit("sources", "prose", "train", "documents", value=97)(site)
    text = site.problems(
        "train.stpes=3",
        "train.max_skipped_in_a_row=none",
        "run.name=a; touch x",
        "model.moe.groups.text.top_k=9",
        "model.vocab_size=40",
        "data.seq_len=128",
        "parallel.ep=3",
        "placement.groups.text.ranks=[7]",
        "data.weights={prose: 1, captoins: 2}",
        "train.global_batch=8",
        "model.moe.groups.image.modalities=[image, sound]",
    )
    for part in (
        "train.stpes",
        "train.max_skipped_in_a_row='none'",
        "run.name='a; touch x'",
        "top_k=9",
        "model.vocab_size=40",
        "data.seq_len=128",
        "[7] out of range",
        "data.weights.captoins",
        "train.global_batch=8: must be a multiple of train.micro_batch=2 x 3 ranks",
        "'sound': no such modality in the data",
        "captions_train.bin: 4030 bytes",
        "prose_valid.idx: missing",
        "manifest says 97",
    ):
        assert part in text, part


def test_nothing_follows_from_what_could_not_be_read(site: Site) -> None:
    text = site.problems("parallel.ep=two", "data.path=3\n4", "placement.groups.text.ranks=[1]")
    assert "parallel.ep='two'" in text
    for spurious in ("multiple", "out of range", "no manifest.json", "free for"):
        assert spurious not in text


def test_layout_for_a_dry_run_needs_no_data(site: Site) -> None:
    config = load_config(site.config)
    assert layout_without_data(config).token_mix == site.check().token_mix
    shutil.rmtree(site.data)
    layout = layout_without_data(config)
    assert layout.token_mix == {}
    assert layout.placement.slots == ((0, 1, 2), (3, 4))
    with refused(ConfigError):
        layout_without_data(load_config(site.config, ["data.seq_len=65"]))


@pytest.mark.parametrize(
    ("kind", "missing", "files"),
    [
        ("deep_ep_v2", "the package deep_ep.buffers.elastic is not installed here; build DeepEP V2 from the main branch",
         ("deep_ep/__init__.py", "deep_ep/buffers/elastic.py")),
        ("hybrid_ep", "the package deep_ep and hybrid_ep_cpp is not installed here; build DeepEP from the branch hybrid-ep",
         ("deep_ep/__init__.py", "hybrid_ep_cpp/__init__.py")),
    ],
)  # fmt: skip
def test_packages_of_a_dispatcher_are_searched_and_not_imported(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, missing: str, files: tuple[str, ...]
) -> None:
    sound = (f"parallel.dispatch.kind={kind}", "parallel.precision=bf16", "parallel.device=cuda", "model.hidden_dim=256")
    layout_without_data(load_config(site.config, sound))  # a dry run needs neither data nor packages
    monkeypatch.syspath_prepend(tmp_path)
    for name in files:
        assert missing.partition(" and ")[0] in site.problems(*sound) or "is not installed here" in site.problems(*sound)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("raise ImportError('preflight must not import it')")
    site.check(*sound)
