"""Loads a run's model from a checkpoint of any layout of ranks, with all experts on one rank or spread over ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from moe_dist.checkpoint.base import content_hash
from moe_dist.checkpoint.contents import Contents, open_checkpoint
from moe_dist.checkpoint.directory import CheckpointDirectory, find_checkpoint
from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, capture
from moe_dist.config.base.section import named
from moe_dist.config.load import load_config
from moe_dist.config.parallel.section import InterleavedSection
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import Manifest, load_manifest
from moe_dist.formats.split_files import data_digest, digest_problems
from moe_dist.hf.source import weights_digest
from moe_dist.inference.generate import Generator
from moe_dist.inference.likelihood import Likelihood
from moe_dist.inference.vocabulary import Vocabulary
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.initialise import set_whole
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.flops import parameters
from moe_dist.plan.policies import expert_groups, make_placement, replicated_placement
from moe_dist.plan.preflight import manifest_violations
from moe_dist.train.build.training import build_for_inference, freeze, group_of_modality, rank_layout, saved_part
from moe_dist.train.start.base_weights import load_base
from moe_dist.train.start.resume import mapping_of, saved_config


class CheckpointReader:
    """Loads several checkpoints of one run, one after another, into one model in evaluation mode.

    Args:
        checkpoints: Folder of the run's checkpoints.
        config: The run's configuration. Its layout of ranks is ignored.
        mesh: The mesh over whose EP groups the experts are divided; None puts all experts on this rank.
    """

    def __init__(self, checkpoints: Path, config: Config, device: torch.device, mesh: Mesh | None = None) -> None:
        self.placement = placement_for_use(config, 1 if mesh is None else mesh.ep_size)
        self.model = build_for_inference(config, self.placement, device, mesh)
        freeze(self.model, config)
        group = None if mesh is None else mesh.checkpoint
        self._manager = CheckpointManager(checkpoints, keep=1, lease_check=lambda: None, process_group=group)
        self._config = config
        self._layout, part = rank_layout(self.placement, mesh), saved_part(config)
        self.state = capture(self.model, None, self._layout, part=part)
        self._has_base = part != "trained"  # a checkpoint of adapters does not contain the base weights

    def read(self, folder: Path) -> Transformer:
        """Loads a checkpoint and returns the model. With a mesh, all its ranks must call `read`. Raises DataError if the
        checkpoint is damaged, or the base model of its adapters is missing."""
        restored = self._manager.load(folder, self.state)
        if not self._has_base:  # the base is loaded once, because all checkpoints of a run have the same base
            load_base(self._config, restored.values, folder, self._manager, self.model, self._layout)
            self._has_base = True
        self.model.ready()
        return self.model


def placement_for_use(config: Config, ranks: int) -> ExpertPlacement:
    """Returns the placement of a trained model's experts on an EP group of `ranks` ranks, for inference."""
    groups = expert_groups(config.model.moe)
    if config.model.moe.experts.replicated:
        return replicated_placement(groups)
    return make_placement(InterleavedSection(policy="interleaved"), groups, num_ranks=ranks, token_mix={})


def trained_placement(folder: Path, groups: tuple[ExpertGroup, ...]) -> ExpertPlacement:
    """Returns the expert placement of the ranks that saved the checkpoint in `folder`. Raises DataError if the placement in
    state.json does not contain exactly the experts of `groups`."""
    slots = open_checkpoint(folder).state.placement.get("slots")
    try:
        return ExpertPlacement(groups, tuple(tuple(rank) for rank in slots))  # pyright: ignore
    except (TypeError, ConfigError) as error:
        raise DataError(
            f"{folder}/state.json: placement.slots={slots!r:.80} does not place the experts of its configuration ("
            f"{error}); restore the file"
        ) from error


@dataclass(frozen=True)
class LoadedRun:
    """A checkpoint with its run's configuration and manifest. The method `load` loads the weights.

    Attributes:
        folder: Folder of the checkpoint.
        step: Number of training steps done before the checkpoint.
        config: The saved configuration, but with `data.path` set to the folder where the data set is now.
    """

    folder: Path
    step: int
    config: Config
    manifest: Manifest

    @property
    def run_folder(self) -> Path:
        """Returns the run's folder, or the folder that contains the checkpoint if it belongs to no run."""
        return self.folder.parent.parent if self.folder.parent.name == "checkpoints" else self.folder.parent

    @property
    def digest(self) -> str:
        """Returns a SHA-256 of the weights. Samples of router tuning name it."""
        return content_hash(open_checkpoint(self.folder).index)

    def load(self, device: torch.device, mesh: Mesh | None = None) -> Transformer:
        """Loads and returns the model in evaluation mode, see `CheckpointReader`. All ranks of a mesh must call `load`."""
        return CheckpointReader(self.folder.parent, self.config, device, mesh).read(self.folder)

    def vocabulary(self) -> Vocabulary:
        """Returns the tokenizer, grammar and codebook of the run's data set as a `Vocabulary`."""
        model = self.config.model
        return Vocabulary(self.config.data.path, self.manifest, vocab_size=model.vocab_size, model_folder=model.folder)

    def generator(self, model: Transformer, vocabulary: Vocabulary) -> Generator:
        """Returns the engine's generator for a loaded model with all experts. Raises ConfigError if the data set has no
        grammar."""
        groups, max_seq_len = self.group_of_modality, self.config.model.max_seq_len
        made = named(self.config.engine.generator)
        return made(model, vocabulary.grammar, group_of_modality=groups, max_seq_len=max_seq_len)

    def likelihood(self, device: torch.device, mesh: Mesh | None = None) -> Likelihood:
        """Loads the model and returns a `Likelihood` for it. With a mesh, all its ranks must call this method."""
        model, groups = self.load(device, mesh), self.group_of_modality
        max_seq_len = self.config.model.max_seq_len
        return Likelihood(model, self.manifest, group_of_modality=groups, max_seq_len=max_seq_len, mesh=mesh)

    @property
    def group_of_modality(self) -> list[int]:
        """Returns the index of each modality's expert group, in the manifest's order of modalities."""
        return group_of_modality(self.manifest, placement_for_use(self.config, 1))


@dataclass(frozen=True)
class FolderModel(LoadedRun):
    """The model in `model.folder`, as it is before a run trains it. `folder` is that folder."""

    @property
    def run_folder(self) -> Path:
        return Path(self.config.run.root) / self.config.run.name

    @property
    def digest(self) -> str:
        return weights_digest(self.folder)

    def load(self, device: torch.device, mesh: Mesh | None = None) -> Transformer:
        from moe_dist.hf.host.lora import first_values  # imported only here, because it takes seconds
        from moe_dist.hf.host.weights import read_folder
        from moe_dist.train.build.hosted import draw

        ranks, rank = (1, 0) if mesh is None else (mesh.ep_size, mesh.ep_rank)
        placement = placement_for_use(self.config, ranks)
        model: Any = build_for_inference(self.config, placement, device, mesh)
        if hasattr(model.family, "moe_dist_banks"):  # routers and adapters that the folder lacks
            draw(model, placement.slots[rank], self.config.run.seed)
        read_folder(model, self.folder, placement.slots[rank])
        if self.config.model.lora is not None:
            for parameter, whole in first_values(
                model, self.config.model.lora, placement.slots[rank], self.config.run.seed
            ):
                set_whole(parameter, whole)
        model.ready()
        return model


def causal_problems(config: Config) -> list[str]:
    """Returns the reasons why routing depends on later tokens even in evaluation. Such a model cannot generate."""
    problem = config.model.moe.router.not_causal()
    return [problem] if problem else []


def choose_device(wanted: str) -> torch.device:
    """Returns the torch device for `cpu`, `cuda`, or `auto` (CUDA if available). Raises ConfigError for any other name, or
    if `cuda` is not available."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {wanted}: must be auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; take cpu or auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def find_trained(
    path: Path, *, step: int | None = None, data: Path | None = None, allow: Callable[[Config], list[str]] = lambda _: []
) -> LoadedRun:
    """Finds a checkpoint, and the data set on which its run was trained.

    Args:
        path: A run folder, a folder of checkpoints, the folder of a checkpoint, or the YAML file of a run that begins with
            `model.folder`.
        step: Training step of the checkpoint; by default the newest checkpoint's.
        data: The folder where the data set is now; by default the folder in the run's configuration.
        allow: Function that takes a run's configuration and returns the reasons why the run cannot be used.

    Raises:
        ConfigError: the checkpoint or the data set does not exist, `allow` returns a reason, or the data set does not fit
            an imported model.
        DataError: files are damaged, or the run was trained on other data.
    """
    if begins := step is None and path.suffix == ".yaml":
        config, values = _to_begin(path), {}
        folder, step = Path(str(config.model.folder)), 0
    else:
        folder = find_checkpoint(path) if step is None else _of_step(path, step)
        found = open_checkpoint(folder)
        state = found.state
        config, values, step = saved_config(state.values, folder), state.values, state.step
        _refuse_larger_model(config, found)
    if problems := allow(config):
        raise ConfigError([f"{folder}: {problem}" for problem in problems])
    if data is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": str(data)})})
    manifest = load_manifest(config.data.path)
    if "data" not in values:  # an imported model can be used with any data set that fits it
        unfit = manifest_violations(config, expert_groups(config.model.moe), manifest)
        if problems := [violation.problem for violation in unfit]:
            raise ConfigError([f"{config.data.path}: these data do not fit {folder}", *problems])
    elif problems := digest_problems(mapping_of(values, "data", folder), data_digest(config.data.path, manifest)):
        raise DataError([f"{config.data.path}: these are not the data that {folder} was trained on", *problems])
    return (FolderModel if begins else LoadedRun)(folder, step, config, manifest)


def _refuse_larger_model(config: Config, found: Contents) -> None:
    """Raises DataError if the configuration has far more parameters than the checkpoint, before any memory is taken."""
    if config.engine.hosts or "base" in found.state.values:  # transformers' code has the sizes; adapters lack their base
        return
    tensors = found.index.tensors.items()
    stored = sum(math.prod(entry.shape) for name, entry in tensors if not name.startswith(OPTIMIZER_PREFIX))
    if (described := parameters(config.model).total) > 2 * stored + 1000:
        raise DataError(
            f"{found.folder}: the configuration in state.json describes {described:,.0f} parameters, but the tensors have "
            f"{stored:,}; restore state.json"
        )


def _to_begin(path: Path) -> Config:
    config = load_config(path)
    if config.model.folder is None or config.run.init_from is not None:
        raise ConfigError(f"{path}: its run does not begin with the weights of model.folder; give a run with weights")
    if not Path(config.model.folder).is_dir():
        raise ConfigError(f"model.folder={config.model.folder!r}: no such folder; name a Hugging Face folder")
    return config


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of every command that uses a trained run."""

    run: Annotated[Path, typer.Argument(help="A run, a checkpoint, or the YAML file of a run from model.folder.")]
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; by default the newest.")] = None
    data: Annotated[Path | None, typer.Option(help="Folder of the run's data set, if it has moved.")] = None
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto"

    def find(self, allow: Callable[[Config], list[str]]) -> LoadedRun:
        """Finds the checkpoint of the options with `find_trained`."""
        return find_trained(self.run, step=self.step, data=self.data, allow=allow)


def _of_step(path: Path, step: int) -> Path:
    for folder in (path, path / "checkpoints"):
        directory = CheckpointDirectory(folder)
        if directory.steps():
            if step in directory.steps():
                return directory.path_of(step)
            there = ", ".join(map(str, directory.steps()))
            raise ConfigError(f"--step {step}: {folder} has checkpoints of the steps {there}; take one of them")
    raise ConfigError(f"--step {step}: {path} has no checkpoints; give a run or its folder of checkpoints")
