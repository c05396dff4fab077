"""Scores a trained model on questions, and writes the samples for router tuning. See docs/router-tuning.md."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.formats.tuning_manifest import TuningManifest
from moe_dist.inference.loaded_run import LoadedRun, RunOptions, choose_device
from moe_dist.inference.multiple_choice import Measure, Prompts, ask, check_vocabulary, write
from moe_dist.inference.questions.catalogue import Catalogue, task_names
from moe_dist.inference.questions.files import read_facts
from moe_dist.inference.questions.split import Side
from moe_dist.inference.router_tuning.embedder import PACKAGED, Embedder
from moe_dist.inference.router_tuning.scoring import embedded_text, scored_samples
from moe_dist.parallel.mesh import one_group
from moe_dist.plan.tuning_rules import tokenizer_digest
from moe_dist.runtime.command_line import reports_errors, run_command, takes
from moe_dist.runtime.environment import RankEnv
from moe_dist.train.router_tuning.loader import SampleMaker
from moe_dist.train.router_tuning.samples import check_place, write_samples
from moe_dist.train.router_tuning.tuning import RoutingReader


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(RunOptions):
    out: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")]
    tasks: Annotated[
        str, typer.Option(help="Tasks, separated by commas: pictures, and those of --questions; by default the latter.")
    ] = ""
    questions: Annotated[str, typer.Option(help="Files of questions (docs/evaluation.md), separated by commas.")] = ""
    embedder: Annotated[Path, typer.Option(help="Folder of a sentence embedder.")] = PACKAGED
    limit: Annotated[int, typer.Option(min=0, help="Questions of each task, chosen by the seed; 0 for all.")] = 0
    rotations: Annotated[
        bool, typer.Option(help="List the choices; an answer must be right in every rotation of them.")
    ] = True
    measure: Annotated[Measure, typer.Option(help="Compare log-likelihoods per token, or whole.")] = "normalised"
    layers: Annotated[str, typer.Option(help="Layers whose routing is kept, separated by commas; by default all.")] = ""
    seed: Annotated[int, typer.Option(min=0, help="Seed of sides and choices.")] = 0


@reports_errors("prepare_router_tuning")
@takes(PrepareOptions)
def main(options: PrepareOptions) -> None:
    """Score a run on training questions, and write samples for router tuning."""
    env = RankEnv.from_environment(os.environ)
    check_place(options.out)  # all checks come before the model is loaded, which is slow
    if not options.tasks and not options.questions:
        raise ConfigError("no questions: give --questions or --tasks", see="docs/router-tuning.md")
    facts = read_facts(Path(name.strip()) for name in options.questions.split(",") if name.strip())
    tasks, device = task_names(options.tasks, facts), choose_device(options.device)
    embedder = Embedder(options.embedder, device)
    trained = options.find(_faults)
    layers = _layers(options.layers, trained.config)
    model = trained.config.model
    vocabulary = trained.vocabulary()
    check_vocabulary(vocabulary, vocab_size=model.vocab_size)
    catalogue = Catalogue(vocabulary, tuple(trained.manifest.sources), facts, options.seed)
    catalogue.check(tasks)
    questions = [
        question for task in tasks for question in catalogue.questions(task, Side.TRAIN, limit=options.limit or None)
    ]
    for question in questions:
        embedded_text(question, listed=options.rotations)  # raises if a question has no text to embed
    prompts = Prompts(vocabulary, listed=options.rotations)
    written = write(questions, prompts, rotations=options.rotations, max_seq_len=model.max_seq_len)
    # Embeds one text, so that a damaged embedder causes an error before the slow scoring. The embedder runs on the CPU,
    # because no rank has chosen a device yet.
    Embedder(options.embedder, "cpu")(["a text"])
    with one_group(env, device) as (mesh, device):
        likelihood = trained.likelihood(device, mesh)
        scored = scored_samples(ask(questions, written, likelihood), written, options.measure, listed=options.rotations)
        reader = RoutingReader(
            likelihood.model,
            SampleMaker(trained.manifest),
            group_of_modality=torch.tensor(trained.group_of_modality, device=device),
            places=[model.moe_layers.index(layer) for layer in layers],
            mesh=mesh,
        )
        routing_SLC = reader([each.sample.prompt for each in scored]).numpy()  # collective: each rank reads some prompts
    if env.rank == 0:  # the process group has ended, so no collective can time out while embeddings are computed
        embeddings_SE = embedder([each.text for each in scored])
        manifest = write_samples(
            options.out, scored, embeddings_SE, routing_SLC, _manifest(options, trained, embedder, layers)
        )
        _show(options, manifest)


def _faults(config: Config) -> list[str]:
    router, problems = config.model.moe.router, []
    if not router.softmax_top_k:
        problems.append(f"{router.name}: router tuning compares softmax probabilities of a top-k choice; take a top_k run")
    if config.model.mixture_of_depths is not None:
        problems.append(
            "model.mixture_of_depths: a token that a layer passes by has no routing there; take a run without depths"
        )
    if config.model.has_adapters:
        problems.append(
            "model.moe.experts, model.attention_lora: adapters stand on a frozen base and are trained with their routers; "
            "take a run without adapters"
        )
    return problems


def _layers(wanted: str, config: Config) -> tuple[int, ...]:
    there = config.model.moe_layers
    if not wanted:
        return there
    parts = [part.strip() for part in wanted.split(",")]
    if not all(part.isdecimal() and int(part) in there for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"--layers {wanted}: must be some of the MoE layers {', '.join(map(str, there))}, each once")
    return tuple(sorted(int(part) for part in parts))


def _manifest(options: PrepareOptions, trained: LoadedRun, embedder: Embedder, layers: tuple[int, ...]) -> TuningManifest:
    """Makes the manifest of the samples without its counts, which `write_samples` fills in."""
    return TuningManifest(
        checkpoint=trained.digest,
        run=str(trained.folder),
        step=trained.step,
        model=trained.config.model.model_dump(mode="json"),
        tokenizer=tokenizer_digest(trained.config, trained.manifest),
        embedder=embedder.sha256,
        embedder_name=str(embedder.folder),
        layers=layers,
        options={
            "side": str(Side.TRAIN),
            "seed": options.seed,
            "limit": options.limit,
            "rotations": options.rotations,
            "measure": options.measure,
        },
        tasks={}, samples=0, right=0, longest=0, columns=0, width=0, digests={},
    )  # fmt: skip


def _show(options: PrepareOptions, manifest: TuningManifest) -> None:
    for name, count in manifest.tasks.items():
        print(f"{name}: {count.right:,} of {count.questions:,} right")
    if not manifest.right:
        print("no question is right: only router_tuning.filter_by_success=false, or weight=0, can use these samples")
    print(
        f"{manifest.told:,} of {manifest.samples:,} right choices have a first token that no wrong one has; only these are "
        "labels with router_tuning.objective=choices"
    )
    print(
        f"{options.out}: {manifest.samples:,} samples of at most {manifest.longest} tokens (data.seq_len), routing of the "
        f"layers {', '.join(map(str, manifest.layers))}"
    )


if __name__ == "__main__":
    run_command(main)
