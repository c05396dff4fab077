"""Imports a Hugging Face model of any size as a checkpoint that any layout of ranks can load. Writes the folder `<out>`:

    <out>/step_0/, latest      the checkpoint, for `run.init_from=<out>`
    <out>/config.yaml          a complete configuration for training the model, except for the data
    <out>/huggingface/         the model's config.json and tokenizer files, for a later export

The files are first written to `<out>.importing`, which is renamed to `<out>` when all of them are on disk. After a killed
import, the same command reuses the complete shards in `<out>.importing`. Needs memory for one fp32 shard and one stored
tensor.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import JsonValue, ValidationError

from moe_dist.checkpoint.contents import CHECKSUMS_FILE, checksums_of
from moe_dist.checkpoint.directory import LATEST_FILE
from moe_dist.checkpoint.fits import check_complete
from moe_dist.checkpoint.index import INDEX_FILE, STATE_FILE, DamagedError, shard_file
from moe_dist.checkpoint.shard_header import read_shard_header
from moe_dist.checkpoint.state import RankLayout, TensorSpec
from moe_dist.checkpoint.storage import Snapshot, build_index, sync, write_durably, write_shard
from moe_dist.config.json_text import read_json
from moe_dist.config.load import resolved_yaml, rule_violations
from moe_dist.config.schema import Config
from moe_dist.errors import CheckpointError, ConfigError, DataError
from moe_dist.formats.tokenizer_file import read_tokenizer
from moe_dist.hf.code_checks import refuse_code
from moe_dist.hf.data_files import TOKENIZER_FILE
from moe_dist.hf.forms import read_config
from moe_dist.hf.plan import ImportOptions, ImportPlan, changed_section, check_copies, make_plan, refused
from moe_dist.hf.source import CONFIG_FILE, DTYPES, Source, companion, open_source
from moe_dist.plan.policies import expert_groups, replicated_placement
from moe_dist.runtime.progress import Report

HUGGINGFACE = "huggingface"  # name of a folder in `<out>`, and of the key in state.json that describes the original model
SHARD_BYTES = 512 << 20

_PLAN_FILE, _TREE = "plan.json", "tree"


@dataclass(frozen=True)
class Imported:
    """The result of an import."""

    family: str  # `model_type`
    tensors: int
    shards: int
    kept: int  # number of shards that a killed import had already written
    unread: Sequence[str]  # fields of config.json that were not read
    ignored: Sequence[str]  # pickle files, which are never opened
    left_out: Sequence[str]  # tensors that do not affect the logits, such as those for multi-token prediction
    converted: Mapping[str, int]  # number of tensors by their dtype in the Hugging Face folder; all were converted to fp32


def import_model(
    folder: Path,
    out: Path,
    options: ImportOptions | None = None,
    *,
    data_path: str = ".cache/data/openmoji",
    shard_bytes: int = SHARD_BYTES,
    report: Report = lambda stage, done, total: None,
) -> Imported:
    """Imports the model in `folder` as the new folder `out`.

    Raises:
        ConfigError: `out` exists, an option does not fit the model, or moe_dist does not support the family or a field.
        DataError: `folder` is damaged, or its tensors or its tokenizer do not fit its config.json.
        CheckpointError: `out` cannot be written. Complete shards are kept, so that the same command continues the import.
    """
    options = options or ImportOptions()
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists; nothing is overwritten: remove it, or choose another folder")
    source = open_source(folder)
    refuse_code(folder)
    family, plain, unread = read_config(source.config)
    section = changed_section(plain, family, options)
    check_tokenizer(source, vocab_size=section.vocab_size)
    plan = make_plan(source, family, section, shard_bytes=shard_bytes)
    check_copies(source, plan, shard_bytes=shard_bytes)
    config = run_config(plan, out, options, data_path)
    with _workplace(out) as place:
        save_id = _begin(place, source, plan, options)
        try:
            kept = _write_shards(place, source, plan, options, save_id, report)
            values = {
                "config": config.model_dump(mode="json"),
                HUGGINGFACE: {"folder": str(folder.absolute()), "family": family.name, "dtypes": {**plan.dtypes}},
            }
            _conclude(place / _TREE, source, plan, config, values, save_id)
            if os.path.lexists(out):
                raise ConfigError(f"{out} exists by now; nothing is overwritten")
            (place / _TREE).rename(out)
            sync(out.absolute().parent)
        except OSError as error:
            raise CheckpointError(
                f"{place}: cannot be written: {error.strerror or error}; the same command goes on from there"
            ) from error
    return Imported(
        family=family.name,
        tensors=len({part.name for part in plan.parts}),
        shards=len(plan.shards),
        kept=kept,
        unread=unread,
        ignored=source.pickles,
        left_out=plan.left_out,
        converted={name: list(plan.dtypes.values()).count(name) for name in DTYPES if name in plan.dtypes.values()},
    )


def check_tokenizer(source: Source, *, vocab_size: int) -> None:
    """Checks tokenizer.json if it exists. The model's embedding may have more rows than the tokenizer has tokens, because
    vocabularies are padded. Raises DataError if the file cannot be read, or a token's id is not below `vocab_size`.
    """
    if TOKENIZER_FILE not in source.companions:
        return
    path = companion(source.folder, TOKENIZER_FILE)
    vocabulary = read_tokenizer(path).get_vocab(with_added_tokens=True)
    token = max(vocabulary, key=lambda each: vocabulary[each], default=None)
    if token is not None and vocabulary[token] >= vocab_size:
        raise DataError(
            f"{path}: gives {token!r} the id {vocabulary[token]}, but the model's vocab_size={vocab_size}; it is another "
            "model's tokenizer: put the right one there, or take it away"
        )


def run_config(plan: ImportPlan, out: Path, options: ImportOptions, data_path: str) -> Config:
    """Makes the configuration of a run that fine-tunes the imported model on one device. The user must set `data`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.absolute().name).strip(".-_")[:48] or "model"
    groups = plan.section.moe.groups.values()
    dense = all(group.num_experts + group.num_null == 1 for group in groups)
    router = plan.section.moe.router
    only = "auxiliary_routers" if router.has_auxiliary_routers else None
    values = {
        "run": {"name": f"{name}-tuned", "seed": options.seed, "init_from": str(out)},
        "model": plan.section.model_dump(),
        "data": {"path": data_path, "seq_len": min(1024, plan.section.max_seq_len)},
        "train": {"steps": 1000, "global_batch": 8, "micro_batch": 1, "only": only},
        "optimizer": {"lr": 1e-5, "schedule": {"kind": "cosine", "warmup_steps": 50}},
        "loss": {"balance": {"scope": "step", "schedule": ((0, 0.0 if dense or router.experts_choose else 0.001),)}},
        "evaluation": {"every": 200},
    }
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise refused("the configuration to write would be invalid", error) from error
    if broken := rule_violations(config):
        problems = [f"the model of config.json cannot be: {each.problem}" for each in broken]
        raise ConfigError(problems, see="docs/huggingface.md")
    return config


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """Creates the folder `<out>.importing` if it does not exist, and locks it for this process. Removes the folder at the
    end of the `with` block, and after a DataError, because the same files would cause the error again. Keeps it after any
    other error."""
    place = out.absolute().parent / f"{out.absolute().name}.importing"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / "lock", timeout=0):
            try:
                yield place
            except DataError:
                shutil.rmtree(place, ignore_errors=True)
                raise
            shutil.rmtree(place)
    except Timeout as error:
        raise ConfigError(f"{place}: another import is writing there; wait for it, or choose another folder") from error
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be made: {error.strerror or error}") from error


def _begin(place: Path, source: Source, plan: ImportPlan, options: ImportOptions) -> str:
    """Returns the checkpoint's save id. It is new, unless a killed import with the same source and options has left one.

    Raises:
        ConfigError: the killed import had a different source or different options.
        CheckpointError: the disk does not have enough space.
    """
    told = {
        "files": source.files,
        "config": source.config,
        "options": asdict(options),
        "shards": [[asdict(part) for part in shard] for shard in plan.shards],
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    path = place / _PLAN_FILE
    if path.exists():
        try:
            begun = read_json(path, most_bytes=1 << 16, links=False)
            begun_digest, save_id = begun["digest"], str(begun["save_id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged ({error!r:.100}); import again") from error
        if begun_digest != digest:
            raise ConfigError(
                f"{place}: an import was begun there of another model, with other options, or of files that have changed "
                "since; remove that folder, or choose another one"
            )
        return save_id
    free, wanted = shutil.disk_usage(place).free, plan.nbytes + plan.nbytes // 100
    if free < wanted:
        raise CheckpointError(f"{place}: needs {wanted:,} bytes and {free:,} are free; make room, or choose another disk")
    save_id = secrets.token_hex(6)
    write_durably(place / "plan.new", json.dumps({"digest": digest, "save_id": save_id}).encode())
    (place / "plan.new").rename(path)
    sync(place)
    return save_id


def _write_shards(
    place: Path, source: Source, plan: ImportPlan, options: ImportOptions, save_id: str, report: Report
) -> int:
    """Writes the missing shards, each by one rename. Returns the number of shards that already existed."""
    target, writing = place / _TREE / "step_0", place / "writing"
    for folder in (target, writing):
        folder.mkdir(parents=True, exist_ok=True)
    done = kept = 0
    for number, parts in enumerate(plan.shards):
        if _is_whole(target, number, save_id):
            kept += 1
        else:
            # No variable may refer to the shard's tensors, because their memory must be free before the next shard is read.
            write_shard(
                writing,
                number,
                {part.name: part.make(source, seed=options.seed) for part in parts},
                save_id=save_id,
                step=0,
                rank_values={},
            )
            os.replace(writing / shard_file(number), target / shard_file(number))
        done += sum(part.nbytes for part in parts)
        report("import", done, plan.nbytes)
    sync(target)
    return kept


def _is_whole(folder: Path, number: int, save_id: str) -> bool:
    try:
        return read_shard_header(folder, number).save_id == save_id
    except DamagedError:
        return False


def _conclude(
    tree: Path, source: Source, plan: ImportPlan, config: Config, values: Mapping[str, JsonValue], save_id: str
) -> None:
    """Writes and syncs all files of the import except the shards: index.json, state.json, SHA256SUMS, `latest`, config.yaml
    and the folder `huggingface`."""
    folder = tree / "step_0"
    specs = {part.name: TensorSpec(part.shape, DTYPES["F32"]) for part in plan.parts}
    index = build_index(folder, specs, step=0, save_id=save_id, num_shards=len(plan.shards))
    check_complete(index, specs)
    layout = RankLayout(replicated_placement(expert_groups(config.model.moe)))
    state = Snapshot(0, {}, specs, layout, None, dict(values), {}).state_file(save_id)
    files = {INDEX_FILE: index.model_dump_json().encode(), STATE_FILE: state.to_json()}
    for name, content in {**files, CHECKSUMS_FILE: checksums_of(files, save_id)}.items():
        write_durably(folder / name, content)
    sync(folder)
    write_durably(tree / LATEST_FILE, f"{folder.name}\n".encode())
    write_durably(tree / "config.yaml", resolved_yaml(config).encode())
    (tree / HUGGINGFACE).mkdir(exist_ok=True)
    for name in (CONFIG_FILE, *source.companions):
        write_durably(tree / HUGGINGFACE / name, companion(source.folder, name).read_bytes())
    sync(tree / HUGGINGFACE)
    sync(tree)


def imported_values(values: Mapping[str, Any]) -> tuple[str | None, Mapping[str, str]]:
    """Returns two values from an import's state.json: the Hugging Face family, and the dtype that each logical tensor had
    in the Hugging Face folder. For a checkpoint that is not an import, returns None and no dtypes."""
    noted = values.get(HUGGINGFACE)
    if not isinstance(noted, dict) or not isinstance(noted.get("dtypes"), dict):
        return None, {}
    family = noted.get("family")
    dtypes = {name: each for name, each in noted["dtypes"].items() if each in DTYPES}
    return family if isinstance(family, str) else None, dtypes
