"""TRL ships 41 chat templates. The tests compare our labels with TRL's labels or with the messages' contents.

TRL marks most of its templates with {% generation %} blocks. For templates without these blocks, and for templates that
rewrite earlier turns, the reference is the messages' contents. Each content is one word that occurs nowhere else.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moe_dist.data.chat import Conversation, HubTokenizer
from moe_dist.data.chat_turns import NO_STOP, REWRITTEN, Turns
from moe_dist.data.corpus import Recipe
from moe_dist.data.indexed import IndexedSplit
from moe_dist.data.prepare import Inputs, prepare
from moe_dist.errors import DataError
from tests.support.chat_folders import TOOLS, chat_folder, write_lines
from tests.support.cover import rest_full
from tests.support.invoked import invoke
from tests.support.messages import refused
from tools.prepare_data import main

TRL = importlib.util.find_spec("trl")  # not imported, because each worker would need 2 s more to collect this file
PUBLISHED = Path(TRL.origin).parent / "chat_templates"
FIRST = ["glm4moe", "phi3", "qwen2_5", "qwen3", "gptoss", "llama3_1"]  # all other templates run in the full set
NAMES = FIRST + sorted({path.stem.removesuffix("_training") for path in PUBLISHED.glob("*.jinja")} - set(FIRST))
TOKENS = re.compile(
    r"<[|｜][^<>|｜]*[|｜]>|<(?:start|end)_of_turn>|<end_of_utterance>|<turn\|>|<\|turn>|\[gMASK\]|<sop>|</s>|\[/?INST\]"
)
LISTS = ("idefics3", "llava_next", "smolvlm")  # these templates print only contents that are lists of parts
# TRL also labels the end of the generation prompt, although these templates give it to the model as input.
TRL_PROMPTS = {
    "deepseek_r1_distill": "<｜Assistant｜>", "deepseekv3": "<｜Assistant｜>", "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant", "qwen2_5": "\n", "qwen3_5_nothink": "<think>\n\n</think>\n\n",
    "qwen3_5_think": "<think>\n", "qwen3_6": "<think>\n", "qwen3_8": "<think>\n",
}  # fmt: skip
TRL_TAILS = {"llava_next": " "}  # for other templates TRL labels the white space after a turn
# Templates whose tool calls are not compared with TRL. TRL's labels lack two things: the token that ends generation
# after a call, and the header of an assistant's turn that follows a call.
TRL_CALLS_DIFFER = ("diffusion_gemma",)


def conversations(count: int) -> list[dict[str, Any]]:
    """Returns conversations of one to three questions. A quarter begin with a system message, a fifth begin with an
    assistant's message, a seventh have tool calls, and a sixth end with a question. Each content is one word."""
    rows = []
    for number in range(count):
        words = iter(f"w{number}x{place}" for place in range(99))
        messages: list[dict[str, Any]] = [{"role": "system", "content": next(words)}] if number % 4 == 1 else []
        messages += [{"role": "assistant", "content": next(words)}] if number % 5 == 4 else []
        for _ in range(1 + number % 3):
            messages.append({"role": "user", "content": next(words)})
            if number % 7 == 3:
                call = {"type": "function", "function": {"name": "weather", "arguments": {"city": next(words)}}}
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
                messages.append({"role": "tool", "name": "weather", "content": next(words)})
            messages.append({"role": "assistant", "content": next(words)})
        messages += [{"role": "user", "content": next(words)}] if number % 6 == 5 else []
        rows.append({"messages": messages} | ({"tools": TOOLS} if number % 7 == 3 else {}))
    return rows


def as_lists(row: dict[str, Any]) -> dict[str, Any]:
    lists = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in row["messages"]]
    return {**row, "messages": lists}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """folder(name): a tokenizer of bytes with the template's special tokens."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())

    def make(name: str) -> Path:
        template = (PUBLISHED / f"{name}.jinja").read_text()
        specials = sorted(set(TOKENS.findall(template)))
        plain = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
        plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        plain.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=plain, bos_token="<s>", eos_token="<|endoftext|>", additional_special_tokens=specials
        )
        tokenizer.chat_template = template
        tokenizer.save_pretrained(path := tmp_path_factory.mktemp(name))
        return path

    return make


def tokenizer_of(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def labelled(tokenizer: Any, conversation: Conversation, *, wanted: bool) -> str:
    """Returns the text of all tokens that are labels, or with wanted=False the text of all tokens that are not labels."""
    parts = [document.tokens[~document.prompt if wanted else document.prompt] for document in conversation.documents]  # pyright: ignore
    return "|".join(tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts)


def adapted(tokenizer: Any, ids: list[int], mask: list[int], name: str) -> list[int]:
    """Returns TRL's labels without the generation prompt, and with the white space that ends a turn."""
    given, tail = (
        tokenizer(each.get(name, ""), add_special_tokens=False)["input_ids"] for each in (TRL_PROMPTS, TRL_TAILS)
    )
    found = list(mask)
    for place in range(1, len(mask)):
        if mask[place] > mask[place - 1] and ids[place : place + len(given)] == given:
            found[place : place + len(given)] = [0] * len(given)
        if mask[place] < mask[place - 1] and ids[place : place + len(tail)] == tail:
            found[place : place + len(tail)] = [1] * len(tail)
    return found


@pytest.mark.parametrize("name", rest_full(NAMES, len(FIRST)))
def test_labels_of_published_templates(folder, name: str) -> None:
    """The labels are the assistant's words and the token that ends each turn. They equal TRL's labels, except for the
    generation prompt. If a template rewrites earlier turns, this holds for the last turn."""
    path = folder(name)
    hub, tokenizer = HubTokenizer(path), tokenizer_of(path)
    marked = PUBLISHED / f"{name}_training.jinja"
    equal, encoded = 0, 0
    for row in map(as_lists, conversations(40)) if name in LISTS else conversations(40):
        try:
            found = hub.conversation(row, "row")
        except DataError as error:
            # The template refuses the order of roles, or it has no form for calls and their results.
            if "fails on messages" not in str(error) and not ("tools" in row and "does not print" in str(error)):
                raise
            continue
        encoded += 1
        last = max(number for number, message in enumerate(row["messages"]) if message["role"] == "assistant")
        rewritten = any(note.startswith(REWRITTEN) for note in found.notes)
        labels, others = (set(re.findall(r"w\d+x\d+", labelled(tokenizer, found, wanted=side))) for side in (True, False))
        for number, message in enumerate(row["messages"][: last + 1] if rewritten else row["messages"]):
            words = set(re.findall(r"w\d+x\d+", json.dumps(message)))
            own = message["role"] == "assistant" and (number == last or not rewritten)
            assert words <= (labels if own else others), (row, found)
            assert not words & (others if own else labels), (row, found)
        assert NO_STOP not in found.notes
        if not marked.is_file() or rewritten or (name in TRL_CALLS_DIFFER and "tools" in row):
            continue
        theirs = tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            chat_template=marked.read_text(),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        (document,) = found.documents
        assert document.prompt is not None
        # The tokens may differ: TRL's template for Qwen3 adds an empty <think> to earlier turns.
        if document.tokens.tolist() == theirs["input_ids"]:
            equal += 1
            expected = adapted(tokenizer, theirs["input_ids"], theirs["assistant_masks"], name)
            assert (~document.prompt).astype(int).tolist() == expected, row
    assert encoded >= 12
    assert equal >= 8 or not marked.is_file()


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
AS_TEXT = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
ASKED = {"role": "user", "content": "Hot?"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Hot?"}]}
YES = {"role": "assistant", "content": "Yes."}
CALLED = [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}]


@pytest.mark.parametrize(
    ("name", "messages", "words"),
    [
        (
            "qwen3",
            [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}],
            ("messages.1", "does not print 'Yes.'"),
        ),
        (
            "llama3_1",
            [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}],
            ("messages.1", "Python text"),
        ),
        ("muse_glimmer", [PARTS, YES], None),
        ("phi3", CALLED, ("messages.1.tool_calls.0", "does not print this call")),
        ("lfm2", CALLED, ("messages.1.tool_calls.0", "does not print this call")),
        ("qwen2_5", [ASKED, {"role": "assistant", "content": "", "tool_calls": [AS_TEXT]}], ("arguments", "second time")),
        ("qwen3", [ASKED, {"role": "assistant", "content": "", "tool_calls": [AS_TEXT]}], None),
        ("qwen2_5", CALLED, None),
    ],
)
def test_contents_that_a_template_loses_are_refused(
    folder, name: str, messages: list[Any], words: tuple[str, ...] | None
) -> None:
    hub = HubTokenizer(folder(name))
    if words is None:
        assert hub.conversation({"messages": messages, "tools": TOOLS}, "a.jsonl, line 3").documents
        return
    with refused(DataError, "a.jsonl, line 3", *words):
        hub.conversation({"messages": messages, "tools": TOOLS}, "a.jsonl, line 3")


def test_tools_reasoning_and_ends_that_a_template_lacks_are_notes(folder, tmp_path: Path) -> None:
    thought = {**YES, "reasoning_content": "It is August."}
    notes = HubTokenizer(folder("phi3")).conversation({"messages": [ASKED, thought], "tools": TOOLS}, "").notes
    assert notes == (
        "the chat template does not print all tools (weather)",
        "the chat template does not print reasoning_content",
    )
    (tmp_path / "falcon.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}")
    endless = HubTokenizer(folder("qwen3"), str(tmp_path / "falcon.jinja"))
    assert endless.conversation({"messages": [ASKED, YES]}, "").notes == (NO_STOP,)


@pytest.mark.parametrize("turns", Turns)
def test_a_rewritten_conversation_trains_the_last_turn_or_each(folder, tmp_path: Path, turns: Turns) -> None:
    """Each document is the conversation up to one turn, as the template prints it when the chat has reached that turn."""
    path = folder("qwen3")
    tokenizer = tokenizer_of(path)
    messages = [ASKED, {**YES, "reasoning_content": "Look."}, {"role": "user", "content": "And now?"}, YES]
    lines = write_lines(tmp_path / "lines.jsonl", [{"messages": messages}])
    recipe = Recipe(tokenizer=str(path), val_fraction=0.0, turns=turns)
    manifest, _ = prepare(tmp_path / "set", Inputs(messages=str(lines)), recipe, lambda *_: None)
    data = IndexedSplit(tmp_path / "set", manifest.sources["messages"].train)
    found = [
        (data.tokens(*place), data.prompt(*place))
        for place in zip(data.starts_D.tolist(), data.lengths_D.tolist(), strict=True)
    ]
    ends = (2, 4) if turns is Turns.EACH else (4,)
    for (tokens, prompt), end in zip(found, ends, strict=True):
        before, after = (
            tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=count < end)
            for count in (end - 1, end)
        )
        assert tokenizer.decode(tokens) == after
        assert tokenizer.decode(tokens[~prompt]) == after.removeprefix(before)
    notes = json.loads((tmp_path / "set/recipe.json").read_text())["notes"]
    assert notes == [f"messages: 1 row: {REWRITTEN}; --turns {turns} applies (the first: {lines}, line 1)"]


def test_bad_rows_are_named_or_skipped(tmp_path: Path) -> None:
    """The error names the first ten bad rows. With --skip-bad the command names the first five bad rows, and
    recipe.json lists all of them."""
    thought = {"messages": [ASKED, {**YES, "reasoning_content": "It is August."}]}
    path = write_lines(tmp_path / "lines.jsonl", [thought, *[{"messages": [ASKED]}] * 12])
    with path.open("a") as stream:
        stream.write("no JSON\n")
    tokenizer = chat_folder(tmp_path / "chatml", "chatml")
    with refused(DataError, "10 problems", "line 2:", "line 11:", "--skip-bad"):
        prepare(tmp_path / "set", Inputs(messages=str(path)), Recipe(tokenizer=str(tokenizer)), lambda *_: None)
    options = ["--tokenizer", tokenizer, "--messages", path, "--out", tmp_path / "set", "--skip-bad"]
    done = invoke(main, *options, code=0)
    assert done.output.count("left out: ") == 6
    assert "left out: 8 more" in done.output
    assert "note: messages: 1 row: the chat template does not print reasoning_content (the first: " in done.output
    skipped = json.loads((tmp_path / "set/recipe.json").read_text())["skipped"]
    assert [re.findall(r"line (\d+)", each) for each in skipped] == [[str(line)] for line in range(2, 15)]
