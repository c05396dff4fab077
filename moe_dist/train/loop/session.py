"""Makes the objects that a rank needs around its training loop: device, process groups, watchdog, sinks and summary."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from rich.console import Console
from rich.markup import escape

from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.config.load import resolved_yaml
from moe_dist.config.schema import Config
from moe_dist.data.loader import TrainLoader
from moe_dist.errors import DivergedError, ResourceError, printable
from moe_dist.monitor.card_peaks import peak_tflops
from moe_dist.monitor.compute_map import console_text, draw_map
from moe_dist.monitor.costs import costs_markdown, render_costs
from moe_dist.monitor.devices import DeviceMonitor
from moe_dist.monitor.hints import HintWatch
from moe_dist.monitor.pictures import Subject
from moe_dist.monitor.setup_hints import Settings
from moe_dist.monitor.sinks.console import choice_lines, summary_table
from moe_dist.monitor.sinks.prometheus import RaySink
from moe_dist.monitor.sinks.sink import GuardedSinks, LeaseWatch, Sink, SinkContext
from moe_dist.parallel.determinism import make_deterministic
from moe_dist.parallel.meeting import meeting
from moe_dist.parallel.mesh import Mesh, init_world, make_mesh, own_gpu
from moe_dist.plan.planner import render
from moe_dist.plan.preflight import Preflight
from moe_dist.plan.summary import start_text
from moe_dist.runtime.attempt import Attempt
from moe_dist.runtime.environment import RAY_METRICS, RankEnv
from moe_dist.runtime.hints import warning_lines, warnings_text
from moe_dist.runtime.place import Found, RunPlace, check_place
from moe_dist.runtime.rendezvous import StartWait
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.watchdog import Watchdog
from moe_dist.train.build.training import COMPUTE_DTYPES, Training
from moe_dist.train.loop.fixed_top_k import beside_fixed_top_k
from moe_dist.train.loop.garbage import collected_by_steps
from moe_dist.train.loop.peft_folder import write_adapters
from moe_dist.train.loop.profiling import profiled_steps
from moe_dist.train.loop.trainer import WINDOW, Finished
from moe_dist.train.rank_balance.placement_rows import build_placement_rows
from moe_dist.train.router_tuning.loader import SampleLoader
from moe_dist.train.start.node_check import check_at_start
from moe_dist.train.start.resume import Progress
from moe_dist.train.step.tracing import traced_steps

logger = logging.getLogger(__name__)


@contextmanager
def around_steps(
    checked: Preflight,
    training: Training,
    loader: TrainLoader | SampleLoader,
    progress: Progress,
    folder: RunFolder,
    env: RankEnv,
    attempt: Attempt,
) -> Iterator[dict[str, Any]]:
    """Opens the services that run beside the steps: device readings, profiler, traces, sinks, and garbage collection.
    Yields the arguments with which `Trainer` gets these services."""
    config, mesh, model = checked.config, training.parallel.mesh, training.parallel.model
    start = {"attempt_id": attempt.attempt_id, "step": progress.step, "position": progress.position}
    with (
        watched_devices(config, mesh.device, env) as devices,
        profiled_steps(config, model, mesh.device, folder, env) as profile,
        traced_steps(checked, folder, env, numbers=loader.numbers, **start) as tracer,
        open_sinks(checked, folder, env, attempt, progress=progress) as sinks,
        collected_by_steps(),
    ):
        rows = build_placement_rows(config, checked, mesh, last=WINDOW)
        watchers = [each for each in (tracer, rows) if each is not None]
        yield {"devices": devices, "profile": profile, "watchers": watchers, "sinks": sinks, "placement_rows": rows}


def choose_device(config: Config, env: RankEnv) -> torch.device:
    """Returns the CPU or this rank's GPU. Raises ResourceError if this rank needs a GPU but there is none."""
    wanted = config.parallel.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return own_gpu(env)  # `claim_gpu` detects if two ranks use one GPU


def claim_gpu(store: dist.Store, env: RankEnv, device: torch.device) -> None:  # pyright: ignore[reportPrivateImportUsage]
    """Reserves this rank's GPU for this rank. Does nothing on a CPU. Raises ResourceError if another rank has already
    reserved the same GPU."""
    if device.type != "cuda":
        return
    uuid = torch.cuda.get_device_properties(device).uuid
    if store.add(f"ranks on GPU {uuid}", 1) > 1:
        raise ResourceError(
            f"rank {env.rank}, number {env.local_rank} on {socket.gethostname()}: another rank uses the same GPU {uuid}; "
            "give each rank a GPU of its own (--gpus-per-task=1, CUDA_VISIBLE_DEVICES), or start fewer ranks"
        )


def join_world(config: Config, env: RankEnv, folder: RunFolder, attempt: Attempt, *, stopped: Callable[[], bool]) -> Mesh:
    """Waits for all ranks, and makes the process groups. If a stop signal comes, which `stopped` reports, the wait ends.

    Raises:
        ResourceError: this rank is not on its planned node, or it has no GPU.
        MoeDistError: a check of this node fails, a rank does not join, or the ranks' run folders or attempts differ.
    """
    if config.parallel.deterministic:
        make_deterministic()  # before the first CUDA call, which reads the variables that this function sets
    section, device = config.parallel, choose_device(config, env)
    wait = StartWait(env.rank, section.start_seconds, stopped=stopped, grace_seconds=env.grace_seconds)
    with meeting(env, folder.path, wait) as (store, attempt_id):
        env = attempt.join(attempt_id)
        check_place(RunPlace.from_environment(os.environ), Found.from_environment(os.environ))
        check_at_start(config, env, folder.path)  # before the process group is made, so that no rank waits for a bad node
        claim_gpu(store, env, device)
        timeout = section.timeout_seconds
        init_world(env.init_method, store, rank=env.rank, world_size=env.world_size, device=device, timeout=timeout)
    return make_mesh(ep=section.ep, device=device, timeout=timeout, ranks_per_node=section.dispatch.node_size)


def card_name(config: Config, mesh: Mesh) -> str | None:
    """Returns the name of this rank's GPU; None on a CPU. If its peak is unknown, rank 0 logs how to get perf/mfu."""
    if mesh.device.type != "cuda":
        return None
    card, precision = torch.cuda.get_device_name(mesh.device), config.parallel.precision
    known = config.monitor.peak_tflops is not None or (precision == "bf16" and peak_tflops(card) is not None)
    if mesh.rank == 0 and not known:
        logger.warning(
            "no perf/mfu: the peak rate of %r in %s is unknown; set monitor.peak_tflops to the TFLOP/s of one GPU, without "
            "sparsity (docs/monitoring.md)",
            card,
            precision,
        )
    return card


def start_watchdog(
    config: Config, env: RankEnv, folder: RunFolder, tracker: CollectiveTracker, attempt: Attempt
) -> Watchdog:
    """Returns this rank's watchdog of collectives, started if the run has several ranks. Call it after `join_world`."""
    watchdog = Watchdog(
        tracker,
        rank=env.rank,
        world_size=env.world_size,
        attempt_id=attempt.attempt_id,
        seconds=config.parallel.resolved_watchdog_seconds,
        logs=folder.logs,
        step=attempt.last_step,
        end=attempt.give_up,
    )
    return watchdog.start() if env.world_size > 1 else watchdog


@contextmanager
def watched_devices(config: Config, device: torch.device, env: RankEnv) -> Iterator[DeviceMonitor | None]:
    """Reads the device in a thread during the `with` block. Only rank 0 does this; other ranks yield None."""
    if env.rank != 0:
        yield None
        return
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None
    monitor = DeviceMonitor(seconds=config.monitor.device_seconds, gpu=gpu)  # readings need no sync
    try:
        yield monitor
    finally:
        monitor.stop()


@contextmanager
def open_sinks(
    checked: Preflight, folder: RunFolder, env: RankEnv, attempt: Attempt, *, progress: Progress
) -> Iterator[list[Sink]]:
    """Yields an empty list on all ranks except rank 0. Rank 0's list has one sink, which passes the records of steps and
    evaluations to all configured sinks. The sinks are closed even after an error, so that no record stays in a buffer.

    Before each record, rank 0 checks its lease of the run. A checkpoint is committed only if all records are on disk.
    """
    if env.rank != 0:
        yield []
        return
    console = Console()
    print(start_text(checked, str(folder.path), checked.config.run.root))
    print(placement_text(checked, width=min(120, console.width) if console.is_terminal else 120))
    for before in folder.read_status().attempts[-2:-1]:
        if before.verdict == DivergedError.exit_code:
            print(f"the attempt before this one diverged after step {before.last_step}: {printable(before.reason)}")
            print(f"this attempt goes on after step {progress.step}")
    attempt.lease.check()  # another attempt may have taken the run's lease meanwhile
    made = _build_sinks(checked, folder, progress)  # this first deletes the hints of steps that will be repeated
    said = {each.kind: each.step for each in folder.hints()}
    config = checked.config
    optimizer, trained = config.optimizer, config.run.init_from is not None or config.model.folder is not None
    dealt = config.rank_balance is not None and config.rank_balance.dealing
    settings = Settings(optimizer.clip_norm, optimizer.weight_decay, config.monitor.most_picture_loss, trained, dealt)
    watch = HintWatch(checked.placement.groups, config.model.moe_layers, said=said, settings=settings)
    sinks = GuardedSinks([LeaseWatch(attempt.lease.check), *made], watch)
    attempt.require(sinks.check_written)
    try:
        yield [sinks]
    finally:
        sinks.close()


def _build_sinks(checked: Preflight, folder: RunFolder, progress: Progress) -> list[Sink]:
    """Makes one sink for each section of `monitor.sinks`, and another one if Ray started the run. Writes the configuration
    and the experts' placement to each sink as texts."""
    config, placement = checked.config, checked.placement
    subject = Subject(
        placement.groups,
        placement,
        config.model.moe_layers,
        len(checked.manifest.modalities),
        mixture_of_depths=config.model.mixture_of_depths is not None,
    )
    context = SinkContext(
        folder.path,
        run_name=config.run.name,
        resume_step=progress.step,
        evaluation_owed=progress.owes_evaluation(config.evaluation.every, config.train.steps),
        total_steps=config.train.steps,
        subject=subject,
        modalities=tuple(checked.manifest.modalities),
    )
    sinks: list[Sink] = [section.build(context) for section in config.monitor.sinks]
    if path := os.environ.get(RAY_METRICS):
        sinks.append(RaySink(socket_path=path, run_name=config.run.name, resume_step=progress.step))
    for sink in sinks:
        sink.text("configuration", f"```yaml\n{resolved_yaml(config)}```")
        sink.text("placement", f"```\n{placement_text(checked)}```")
    return sinks


def placement_text(checked: Preflight, *, width: int = 120) -> str:
    """Returns a text of `width` columns. It shows the placement of a run's experts, and the costs that each placement
    policy would have for the run's token mix."""
    if checked.config.model.moe.experts.replicated:
        return "LoRA experts: every rank holds all of them, nothing is exchanged\n"
    return render(
        checked.comparison,
        checked.placement,
        checked.token_mix,
        policy=checked.config.placement.policy,
        width=width,
        itemsize=COMPUTE_DTYPES[checked.config.parallel.precision].itemsize,
    )


def write_texts(finished: Finished, checked: Preflight, sinks: Sequence[Sink]) -> str:
    """Writes the cost table and the comparison with fixed top-k to all sinks. Returns the comparison, or ""."""
    beside = beside_fixed_top_k(checked.config, checked.manifest, finished.evaluation) if sinks else ""
    costs = "" if finished.costs is None else costs_markdown(finished.costs)
    for sink in sinks:
        for title, text in {"fixed top-k": beside, "cost table": costs}.items():
            if text:
                sink.text(title, text)
    return beside


def conclude(
    finished: Finished, folder: RunFolder, checked: Preflight, *, beside: str, stopped: signal.Signals | None = None
) -> None:
    """Prints and stores the summary. If another attempt has finished the run, prints the summary of that attempt instead.

    Args:
        beside: The sentence that `beside_fixed_top_k` returned; "" adds no line to the summary.
        stopped: A stop signal that came too late to stop the run; None if there was none.
    """
    _print_summary(finished, folder, checked, beside)
    if stopped is not None:
        with suppress(OSError, ValueError):  # a closed terminal must not fail a finished run
            print(f"{stopped.name} came too late to stop the run: it is complete", file=sys.stderr)


def _print_summary(finished: Finished, folder: RunFolder, checked: Preflight, beside: str) -> None:
    if not finished.took_steps and folder.summary_txt.is_file():  # another attempt finished the run meanwhile
        print(folder.read_summary())
        return
    console = Console(record=True, highlight=False, width=None if Console().is_terminal else 110)
    title = f"Run {checked.config.run.name}, {finished.evaluation.step} steps"
    held_out = ", ".join(f"{name.replace('_', ' ')} {loss:.3f}" for name, loss in finished.evaluation.loss.items())
    console.print(summary_table(finished.checks, title=title) if finished.checks else f"{title}: held-out {held_out}")
    for line in (*choice_lines(finished.evaluation), *([beside] if beside else [])):
        console.print(line)
    if finished.costs is not None:
        console.print(render_costs(finished.costs))
    if (found := finished.evaluation.compute_map) is not None:
        picture = draw_map(
            found, title=f"Compute map of run {checked.config.run.name} after step {finished.evaluation.step}"
        )
        Image.fromarray(picture).save(folder.compute_map_png)
        for line in (*console_text(found, console.width), f"the same with more pictures: {folder.compute_map_png}"):
            console.print(line)
    console.print(
        f"records {folder.metrics_jsonl}; curves and heat maps: tensorboard --logdir {checked.config.run.root}, then "
        "http://localhost:6006/#custom_scalars"
    )
    if adapters := write_adapters(checked.config, folder, finished.evaluation.step):
        console.print(adapters)
    if finished.checks and not finished.took_steps:
        console.print("no routing checks: this attempt took no step; the last steps' routing is in the records")
    hints = folder.hints()
    for line in (f"done{warnings_text(hints)}", *warning_lines(hints)):  # last, as in a launcher's verdict
        console.print(escape(line), style="yellow" if hints else "green")
    folder.write_summary(console.export_text())
