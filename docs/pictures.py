"""Takes the screenshots of docs/images: TensorBoard and the report of a run, and the report of a sick run.

`make pictures` trains the two runs if they are not there. `python docs/pictures.py RUN SICK` takes the pictures alone. It
needs Chromium (`make test-browser` installs Debian's) and Pillow.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from tests.support.browser import Browser, browser

IMAGES = Path(__file__).parent / "images"
SECONDS = 120.0  # time limit for the first answer of TensorBoard
DRAWING = 30.0  # seconds of waiting: TensorBoard draws its charts some time after the page has loaded
COLOURS = 256  # size of a PNG's palette: the pages have few colours, and a palette shrinks the file to a third


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """The address of a TensorBoard that shows `folder`. Raises TimeoutError if it does not answer within SECONDS."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["tensorboard.main", "--logdir", folder.name, "--port", str(port), "--load_fast", "false"]
    server = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=folder.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(int(SECONDS)):
            try:
                urllib.request.urlopen(f"{address}/data/runs", timeout=SECONDS).close()
                break
            except OSError:
                time.sleep(1)
        else:
            raise TimeoutError(f"TensorBoard of {folder} did not answer at {address} in {SECONDS:.0f} s; start it by hand")
        yield address
    finally:
        server.terminate()
        server.wait(SECONDS)


def take(page: Browser, name: str, *, height: int, top: str | None = None) -> None:
    """Writes docs/images/NAME.png: `height` CSS pixels of the page from its element `top`, at twice the resolution."""
    y = 0 if top is None else page.value(f"document.querySelector({top!r}).getBoundingClientRect().top + scrollY - 12")
    path = page.picture(
        IMAGES / f"{name}.png", clip={"x": 0, "y": y, "width": page.value("innerWidth"), "height": height, "scale": 1}
    )
    Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"{path.relative_to(Path.cwd())}: {path.stat().st_size / 1e3:.0f} KB")


def report(run: Path, folder: Path) -> Path:
    path = folder / f"{run.name}.html"
    subprocess.run([sys.executable, "-m", "moe_dist", "report", str(run), "-o", str(path)], check=True)
    return path


def main() -> None:
    run, sick = map(Path, sys.argv[1:])
    shutil.copyfile(run / "compute_map.png", IMAGES / "compute_map.png")
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder) / "profile") as page:
        runs = Path(folder) / "runs"
        shutil.copytree(run / "tensorboard", runs / run.name / "tensorboard")
        with tensorboard(runs) as address:
            for name, plugin in {"tensorboard": "custom_scalars", "heat_maps": "images"}.items():
                page.open(f"{address}/?{plugin}#{plugin}", width=1300, height=1000, scale=1.5)
                time.sleep(DRAWING)
                take(page, name, height=1000)
        page.open(report(run, Path(folder)), width=1000, scale=1.5)
        page.value(
            "document.querySelectorAll('#specialisation details').forEach((d, i, all) => d.open = i == all.length - 1)"
        )
        take(page, "report_experts", height=1280, top="#specialisation")
        page.open(report(sick, Path(folder)), width=1000, scale=1.5, dark=True)
        take(page, "report_sick_dark", height=1400)


if __name__ == "__main__":
    main()
