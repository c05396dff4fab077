"""Puts findings and panels into one HTML page. The page has no script and loads no other file."""

import re
from html import escape

from moe_dist.monitor.report.drawing import CURVES, MOST_FRAMES
from moe_dist.monitor.report.findings import facts, tiles
from moe_dist.monitor.report.panels import PANELS
from moe_dist.monitor.report.routing import Routing, Subject
from moe_dist.monitor.report.verdicts import headline, verdicts

# Name in the style sheet -> colour in light mode and in print, colour in dark mode. c0, c1 ... are colours of curves.
COLOURS = {
    "page": ("#fff", "#16181c"),
    "ink": ("#202124", "#e8eaed"),
    "quiet": ("#5f6368", "#a3a8af"),
    "line": ("#dadce0", "#3c4043"),
    "card": ("#f6f7f9", "#202329"),
    "bad": ("#b3261e", "#ff8a80"),
    "well": ("#1e6b34", "#7ccf93"),
    "mark": ("#ffe08a", "#6b5200"),
    "c0": ("#2166ac", "#74b2e8"),
    "c1": ("#b2182b", "#ff8078"),
    "c2": ("#23863a", "#7ccf93"),
    "c3": ("#6a51a3", "#b9a5ee"),
    "c4": ("#b8560b", "#f2a65a"),
    "c5": ("#636363", "#b0b0b0"),
}
POLICY = "default-src 'none';img-src data:;style-src 'unsafe-inline'"  # allows neither scripts nor requests
STYLE = """
*{box-sizing:border-box}html{font-size:93.75%}
body{font:1rem/1.5 system-ui,sans-serif;margin:0 auto;padding:1.5rem;max-width:72rem}
body{color:var(--ink);background:var(--page)}a{color:inherit}
h1{font-size:1.5rem;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:0}.q,figcaption,caption,footer{color:var(--quiet)}
section{border-top:1px solid var(--line);padding:1.25rem 0}section>h2+p{margin:.1rem 0 .75rem;color:var(--quiet)}
.found{background:var(--card);border-left:.4rem solid var(--well);padding:.75rem 1rem;margin:1rem 0}
.found.bad{border-color:var(--bad)}.found.few{border-color:var(--quiet)}
.found.few h2{color:var(--ink)}.found h2{color:var(--well)}.found.bad h2{color:var(--bad)}
ul{margin:.4rem 0;padding-left:1.2rem}nav{padding-bottom:1rem}nav a{display:inline-block;margin-right:.9rem}
:focus-visible{outline:3px solid var(--c0);outline-offset:2px}
figure{margin:0 0 1rem}figcaption{font-size:.87rem;max-width:60rem}figcaption b{color:var(--ink)}
svg{display:block;max-width:100%;height:auto;font:12px system-ui,sans-serif}
svg text{fill:var(--ink)}svg .q{fill:var(--quiet)}svg image,img.p{image-rendering:pixelated}
.m{text-anchor:middle}.e{text-anchor:end;text-align:right}.g{stroke:var(--line)}.l{fill:none;stroke-width:2}
img.p{width:1.4rem;height:1.4rem;vertical-align:middle;border:1px solid var(--line)}
.k mark{white-space:pre-wrap}.k svg{display:inline;vertical-align:-2px}
.map{display:inline-block;margin-right:.9rem}.map img{display:block;width:7rem;height:auto;margin-bottom:.2rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.87rem}caption{text-align:left;padding-bottom:.3rem}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}th,td:not(.e){text-align:left}
code{background:var(--card);border:1px solid var(--line);border-radius:3px;padding:0 .2em;white-space:pre}
.k>span{display:inline-block;margin-right:.7rem}.k{overflow-wrap:anywhere}mark{background:var(--mark);color:inherit}
details{margin:.4rem 0}summary{cursor:pointer;padding:.2rem 0}
.slider{display:flex;flex-wrap:wrap;border:1px solid var(--line);padding:.5rem .75rem;margin:0;min-width:0}
.slider input{appearance:none;flex:1;min-width:1rem;height:1.2rem;margin:0 1px;background:var(--line);cursor:pointer}
.slider input:checked{background:var(--c0)}.slider label{display:none;order:1;width:100%;font-weight:600}
.slider input:checked+label{display:block;padding:.3rem 0}.frames{order:2;width:100%}.frames>div{display:none}
footer{font-size:.87rem;border-top:1px solid var(--line);padding-top:1rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.75rem}
.tiles p{margin:.75rem 0 0;background:var(--card);padding:.5rem .75rem}
.tiles b{display:block;font-size:1.5rem;line-height:1.3}
.heads{list-style:none;padding:0}.heads li{padding:.3rem 0 .3rem 6.5rem;overflow-wrap:anywhere}
.heads b{display:inline-block;width:6.5rem;margin-left:-6.5rem}
.well>b{color:var(--well)}.bad>b{color:var(--bad)}.few>b{color:var(--quiet)}
@media(max-width:600px){body{padding:.75rem}figure{overflow-x:auto}svg{max-width:none}
.c>svg{max-width:100%;font-size:20px}
.heads li{padding-left:0}.heads b{display:block;margin:0}nav a{padding:.3rem 0}}
@media print{html{font-size:8.5pt}body{max-width:none;padding:0}nav,.slider input{display:none}
figure,tr,.found{break-inside:avoid}h2{break-after:avoid}.wide{overflow:visible}*{print-color-adjust:exact}}
"""


def render(subject: Subject) -> str:
    """Returns the page. It begins with four figures and the problems."""
    routing = subject.routing
    sections = [(_anchor(title), title, question, panel(subject)) for title, question, panel in PANELS]
    figures = "".join(f"<p><b>{figure}</b>{escape(words)}</p>" for figure, words in tiles(routing))
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _, _ in sections)
    body = "".join(
        f'<section id="{anchor}" aria-labelledby="h-{anchor}"><h2 id="h-{anchor}">{escape(title)}</h2>'
        f"<p>{escape(question)}</p>{content}</section>"
        for anchor, title, question, content in sections
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Report on {escape(routing.name)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<link rel="icon" href="data:,"><style>{_style()}</style></head><body>'
        f'<header><h1>Report on {escape(routing.name)}</h1><div class="q">{escape(_about(routing))}</div>'
        f'<div class="tiles">{figures}</div></header>'
        f'<main>{_findings(routing)}<nav aria-label="Panels">{links}</nav>{body}</main>'
        "<footer>Load is the number of choices of an expert. docs/monitoring.md has the rules of the first lines.</footer>"
        "</body></html>\n"
    )


def _findings(routing: Routing) -> str:
    found = verdicts(routing)
    state, head = headline(found)
    marks = {"well": "&#10003;", "bad": "&#10007;", "few": "?"}
    lines = "".join(
        f'<li class="{each.state}"><b><span aria-hidden="true">{marks[each.state]}</span> {each.subject}</b> '
        f"{'not judged: ' * (each.state == 'few')}{escape(each.text).replace(chr(10), '<br>')}</li>"
        for each in found
    )
    more = "".join(f"<p>{escape(text)}</p>" for text in remarks(routing))
    numbers = "".join(f"<li>{escape(text)}</li>" for text in facts(routing))
    return (
        f'<div class="found {state}" role="status"><h2>{escape(head)}</h2>{more}<ul class="heads">{lines}</ul></div>'
        f"<h2>In words</h2><ul>{numbers}</ul>"
    )


def remarks(routing: Routing) -> list[str]:
    """Returns sentences on how the run ended, and on damaged records."""
    damaged = [] if routing.history is None else routing.history.damaged
    text = f"{len(damaged)} damaged records of metrics.jsonl are left out: {', '.join(damaged[:5])}"
    return [*filter(None, [routing.ended]), *([text + ", ..." * (len(damaged) > 5) + "."] if damaged else [])]


def _about(routing: Routing) -> str:
    groups = ", ".join(f"{g.name}: {g.num_experts} experts + {g.num_null} null, top {g.top_k}" for g in routing.groups)
    ranks = routing.placement.num_ranks
    steps = routing.frames[0]._replace(last=routing.frames[-1].last).words
    text = (
        f"{len(routing.layers)} MoE layers ({groups}) on {ranks} EP rank{'s' * (ranks > 1)}. Counts: {steps}, "
        f"{routing.source}."
    )
    if routing.tokens is None:
        return text
    tokens = routing.tokens
    which = f"{tokens.split} tokens of step{'s' * (len(tokens.steps) > 1)} {', '.join(map(str, tokens.steps[-3:]))}"
    return f"{text} Tokens: {len(tokens.token_T):,} {which}."


def _style() -> str:
    """Returns the style sheet: the colours of light and dark mode, and the rules for curves and sliders."""
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in COLOURS.items()) for i in (0, 1))
    schemes = f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    classes = "".join(f".l{i}{{stroke:var(--c{i})}}.d{i}{{fill:var(--c{i})}}" for i in range(CURVES))
    frames = ",".join(f".slider input:nth-of-type({i}):checked~.frames>:nth-child({i})" for i in range(1, MOST_FRAMES + 1))
    return f"{schemes}{STYLE}{classes}{frames}{{display:block}}"


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")
