"""At each token's place, a report's compute map shows the token's number of true experts, averaged over the layers."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
from PIL import Image

from moe_dist.monitor.heatmaps import colour, linear_scale
from moe_dist.monitor.report.routing import Routing, Subject
from moe_dist.monitor.report.token_panels import compute_maps
from tests.unit.monitor.report.conftest import draw_routing

GRID = (2, 3)
# Two sequences of text (ids below 100) and picture cells. The first sequence has a whole picture. The second begins
# with the last part of a cut picture, and also has a whole picture.
TOKENS = [[7, 8, 101, 102, 103, 104, 105, 106, 9], [107, 108, 109, 110, 1, 101, 101, 101, 102, 102, 103]]


def mapped(**changes: object) -> tuple[str, Routing]:
    length = sum(map(len, TOKENS))
    routing = draw_routing(tokens=length)
    places = {
        "token_T": np.concatenate(TOKENS),
        "sequence_T": np.repeat([4, 5], [len(each) for each in TOKENS]),
        "position_T": np.concatenate([np.arange(len(each)) for each in TOKENS]),
        "grid": GRID,
    }
    routing = replace(routing, tokens=replace(routing.tokens, **{**places, **changes}))
    return compute_maps(Subject(routing, None, [], ())), routing


def test_whole_pictures_and_texts_have_their_tokens_experts() -> None:
    page, routing = mapped()
    experts_T = ((routing.tokens.ids_TLK >= 0) & (routing.tokens.ids_TLK < routing.placement.num_experts)).sum(2).mean(1)
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in re.findall(r'base64,([^"]+)', page)]
    places = {2: [101, 102, 103, 104, 105, 106], 14: [101, 101, 101, 102, 102, 103]}
    drawn = {
        int(np.argmax([picture[0, 4, 0] == cells[1] for cells in places.values()])): (picture, experts)
        for picture, experts in zip(images[::2], images[1::2], strict=True)
    }
    assert sorted(drawn) == [0, 1]
    for number, (start, cells) in enumerate(places.items()):
        picture, experts = drawn[number]
        assert picture.shape == (8, 12, 3)
        assert picture[::4, ::4, 0].ravel().tolist() == cells
        assert np.array_equal(experts, colour(experts_T[start : start + 6].reshape(GRID), linear_scale("", 4.0)))
    _, *texts = page.split("<p")[1:]  # drops the legend
    titles = [re.findall(r'title="([\d.]+)"', text) for text in texts]
    assert titles == [[f"{experts_T[i]:.2f}" for i in rows] for rows in ((0, 1), (8,), (13,))]
