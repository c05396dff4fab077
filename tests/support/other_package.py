"""A package outside of this project, written as pip would install it, with a router that takes the top k cosines."""

from pathlib import Path

PACKAGE = "acme-routers"
SECTION = '''
from typing import Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import Violation
from moe_dist.config.routers.base import RouterSection


class CosineSection(RouterSection):
    """Acme's top-k by the cosine between token and router row."""

    builds = "acme_routers.router:CosineRouter"
    softmax_top_k = True

    kind: Literal["acme_cosine"] = "acme_cosine"
    temperature: PositiveFloat = Field(default=0.1, description="Divisor of the cosines.")
    bounds: tuple[float, ...] = ()
    """A list, which JSON has no tuples for."""

    def violations_in(self, config):
        if self.temperature > 9.0:
            yield Violation(("model.moe.router.temperature",), "model.moe.router.temperature: is hot; lower it below 9")
'''
ROUTER = """
import torch.nn.functional as F

from moe_dist.moe.routers.top_k import TopKRouter


class CosineRouter(TopKRouter):
    def __init__(self, context, *, temperature, bounds):
        super().__init__(context)
        self.temperature = temperature

    def _logits(self, h_TD):
        return super()._logits(F.normalize(h_TD, dim=-1)) / self.temperature
"""


def write_package(folder: Path, *, name: str = PACKAGE, section: str = SECTION, kind: str = "acme_cosine") -> Path:
    """Writes the package, and returns its folder. If the folder is on sys.path, moe_dist finds the router."""
    module = name.replace("-", "_")
    (folder / module).mkdir(parents=True)
    for file, text in {"__init__": "", "section": section, "router": ROUTER}.items():
        (folder / module / f"{file}.py").write_text(text)
    about = folder / f"{module}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[moe_dist.routers]\n{kind} = {module}.section:CosineSection\n")
    return folder
