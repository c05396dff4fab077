"""Shows progress bars for long-running tools on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn

Report = Callable[[str, int, int], None]  # (stage, done, total)


@contextmanager
def shown_progress() -> Iterator[Report]:
    """Yields a function that updates the progress bar of a stage."""
    _, bar, percentage, remaining = Progress.get_default_columns()
    columns = (TextColumn("{task.description:<28}"), bar, percentage, TimeElapsedColumn(), remaining)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        stages: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = progress.add_task(stage, total=total)
            progress.update(stages[stage], completed=done)

        yield report
